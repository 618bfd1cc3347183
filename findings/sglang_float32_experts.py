"""SGLang's Triton experts in float32, without our suite: run beside 0.5.23; the kernels are interpreted.

_fused_moe_kernel_sequence tells its kernels to compute in float16 wherever x is not bfloat16: what experts put out is
rounded to float16, and above 65504 it is infinite.
"""

from importlib import import_module
from unittest.mock import patch

import sglang_without_gpu  # noqa: F401
import torch
from sglang.kernels.ops.moe import fused_moe_triton_kernels, moe_align_small_numel
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config
from sglang.srt.layers.moe.topk import StandardTopKOutput

aligning = import_module(f"{fused_moe.__package__}.moe_align_block_size")
small = {"_is_cuda": True, "SMALL_NUMEL_LIMIT": 64, "_CUDA_SMALL_BATCH_MAX_BUCKETS": -1}
small["moe_align_small_numel"] = moe_align_small_numel.moe_align_small_numel
for name, value in small.items():
    patch.object(aligning, name, value, create=True).start()
for module in (fused_moe, fused_moe_triton_kernels, moe_align_small_numel):
    patch.object(module, "is_arch_support_pdl", lambda: False).start()
patch.object(fused_moe_triton_config, "get_device_name", lambda: "CPU").start()
fused_moe.outplace_fused_experts = fused_moe.outplace_fused_experts.__wrapped__  # registered for CUDA alone
config = MoeRunnerConfig(num_experts=2, num_local_experts=2, inplace=False, activation="silu", is_gated=True)
for times in (1.0, 300.0):
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(1, 16) * times, torch.randn(2, 16, 16), torch.randn(2, 16, 8)
    routing = StandardTopKOutput(torch.full((1, 2), 0.5), torch.tensor([[0, 1]], dtype=torch.int32), None)
    got = fused_moe.fused_experts(x, w13, w2, routing, config)
    h = torch.einsum("th,eih->eti", x, w13)
    want = torch.einsum("eti,ehi->th", torch.nn.functional.silu(h[..., :8]) * h[..., 8:], w2) / 2
    print(f"x times {times}: got {got[0, :3].tolist()}, want {want[0, :3].tolist()}")
