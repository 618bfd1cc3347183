"""SGLang's routed_scaling_factor on a CPU, without our suite: run beside 0.5.23.

Kimi-Linear, Bailing-MoE, Beam and Sarvam hand the factor to their experts alone. A GPU's experts multiply their sum by
it; moe_forward_native, which a CPU without AMX has, does not, and neither do those models: the routed sum is too small.
"""

import inspect

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.models import bailing_moe, kimi_linear

sizes = {"top_k": 1, "params_dtype": torch.float32, "uses_expert_location": False}
layer = FusedMoE(2, 4, 4, layer_id=0, routed_scaling_factor=2.5, **sizes)
layer.w13_weight.data.copy_(torch.eye(4).repeat(2, 1))  # gate = up = x
layer.w2_weight.data.copy_(torch.eye(4))
x = torch.full((1, 4), 2.0)
got = layer(x.clone(), StandardTopKOutput(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), None))[0, 0]
want = 2.5 * torch.nn.functional.silu(torch.tensor(2.0)) * 2
print(f"routed_scaling_factor=2.5: got {got:.4f}, want {want:.4f}")
for block in (kimi_linear.KimiMoE, bailing_moe.BailingMoESparseMoeBlock):
    lines = [line.strip() for line in inspect.getsource(block).splitlines() if "routed_scaling_factor" in line]
    print(block.__name__, lines)
