"""The dtype in which vLLM's routers compute scores, without our suite: run beside any release from 0.19 on.

Models route in float32. On a CPU, plain softmax is computed in the dtype of the logits, and without renormalisation
(OLMoE, Qwen2-MoE) from a logarithm that is rounded to it: in bfloat16, the same constant added to all logits changes
weights by percents. Grouped routing without the fused operator (a GPU of AMD without AITER, or without a bias) rounds
scores to that dtype, and chooses other experts for it.
"""

import os
from importlib import import_module
from importlib.util import find_spec

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
import vllm
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

where = "vllm.model_executor.layers.fused_moe."  # the router for CPUs, which has moved
places = [where + name for name in ("router.cpu_router", "cpu_fused_moe", "experts.cpu_moe")]
module = import_module(next(place for place in places if find_spec(place.rpartition(".")[0]) and find_spec(place)))
logits = torch.tensor([[1.0, 0.75, -1.0, -2.0]])
for added in (0.0, 8.0):
    narrow = (logits + added).bfloat16()  # exact
    got, ids = module.select_experts(narrow, narrow, 2, use_grouped_topk=False, renormalize=False)
    want = logits.softmax(-1).gather(1, ids.long())
    print(vllm.__version__, f"softmax of bfloat16 logits {added:+}: got {got[0].tolist()}, want {want[0].tolist()}")

logits = torch.tensor([[5.0, 5.25, 5.5, 5.75]])  # exact in bfloat16; their sigmoids are one number there
_, ids = grouped_topk(logits.bfloat16(), logits.bfloat16(), 1, False, 1, 1, "sigmoid")
print(vllm.__version__, f"grouped_topk of bfloat16 logits: expert {ids[0].tolist()}, want [3]")
