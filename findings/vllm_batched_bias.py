"""Biases of experts in vLLM's batched Triton experts, without our suite: run beside release 0.32.0.

These experts take rows sorted by expert, and are asked for with `--moe-backend batched_triton` on an XPU, or chosen
where ranks exchange tokens by DeepEP's low-latency kernels. A layer with has_bias is accepted, its biases are loaded,
and neither is added. Here the platform says that it is an XPU, and Triton's kernels are interpreted.
"""

import json
import os
import tempfile
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
from triton import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """A build for a CPU switches Triton off where no driver is active; nothing is compiled by this one."""

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cpu", "none", 1)

    def get_active_torch_device(self):
        return torch.device("cpu")


Driver.__abstractmethods__ = frozenset()
backends.backends.setdefault("cpu", backends.Backend(compiler=None, driver=Driver))

# ruff: noqa: E402 - vLLM looks for Triton's drivers when it is imported.
import vllm
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import fused_moe
from vllm.platforms import current_platform
from vllm.v1.worker import workspace


class XPU:
    def __getattr__(self, name):
        return getattr(current_platform, name)

    def is_cpu(self):
        return False

    def is_xpu(self):
        return True


text = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text | {"num_local_experts": 1, "max_position_embeddings": 256}))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4, "moe_backend": "batched_triton"}
arguments = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
parts = ("oracle.unquantized", "all2all_utils", "experts.fused_batched_moe", "modular_kernel", "config")
modules = [import_module(f"vllm.model_executor.layers.fused_moe.{name}") for name in parts]
with ExitStack() as stack:
    stack.enter_context(set_current_vllm_config(arguments.create_engine_config()))
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    for module in modules:
        stack.enter_context(patch.object(module, "current_platform", XPU()))
    # They ask for the stream and the cache of a GPU.
    stack.enter_context(patch.object(modules[2], "_is_capturing_or_compiling", lambda: False))
    stack.enter_context(patch.object(torch.accelerator, "empty_cache", lambda: None))
    workspace.init_workspace_manager(torch.device("cpu"))
    sizes = {"num_experts": 2, "top_k": 1, "hidden_size": 64, "intermediate_size": 64, "has_bias": True}
    layer = fused_moe.FusedMoEFactory(**sizes, params_dtype=torch.float32, prefix="model.layers.0.experts")
    experts = layer.routed_experts
    for parameter in experts.parameters(recurse=False):
        parameter.data.zero_()
    experts.w2_bias.data.fill_(3.0)
    experts.quant_method.process_weights_after_loading(experts)
    got = experts.quant_method.apply(
        layer=experts, x=torch.ones(1, 64), topk_weights=torch.ones(1, 1), topk_ids=torch.zeros(1, 1).int(),
        shared_experts=None, shared_experts_input=None,
    )  # fmt: skip
    kernel = type(experts.quant_method.moe_kernel.fused_experts).__name__
print(vllm.__version__, f"{kernel}: weights of 0, w2_bias of 3, weight 1: got {got[0, 0].item()}, want 3.0")
