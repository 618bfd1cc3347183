"""No tokens and experts in groups in vLLM, without our suite: run beside any release from 0.19 on.

A rank without tokens routes none. vLLM's torch of grouped routing, its own on a CPU and the one for a GPU without the
fused operator, asks torch to guess a dimension of an empty tensor, and dies.
"""

import os
from importlib import import_module
from importlib.util import find_spec

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
import vllm
from vllm.model_executor.layers.fused_moe.router import grouped_topk_router as gpu

where = "vllm.model_executor.layers.fused_moe."  # the router for CPUs, which has moved
places = [where + name for name in ("router.cpu_router", "cpu_fused_moe", "experts.cpu_moe")]
cpu = import_module(next(place for place in places if find_spec(place.rpartition(".")[0]) and find_spec(place)))
none = torch.empty(0, 4)
for name, route in (
    ("CPU", lambda: cpu.select_experts(none, none, 2, True, True, topk_group=1, num_expert_group=2)),
    ("GPU", lambda: gpu.grouped_topk(none, none, 2, True, num_expert_group=2, topk_group=1)),
):
    try:
        print(vllm.__version__, f"{name}: ids of shape", list(route()[1].shape))
    except RuntimeError as error:
        print(vllm.__version__, f"{name}: want ids of shape [0, 2], got {type(error).__name__}: {error}")
