"""The experts that SGLang gives to torch.compile for one token, without our suite: run beside 0.5.23.

fused_moe_forward_native leaves out the biases, the alpha and the limit of gpt-oss's experts, all of which
moe_forward_native computes with, and takes an id of -1 for the last expert.
"""

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native, moe_forward_native
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

oai = {"with_bias": True, "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
for name, arguments in (("gpt-oss", oai), ("plain", {})):
    layer = FusedMoE(3, 8, 8, layer_id=0, top_k=1, params_dtype=torch.float32, uses_expert_location=False, **arguments)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(1, 8)
    for expert in (0,) if arguments else (0, -1, 2):
        routing = StandardTopKOutput(torch.ones(1, 1), torch.tensor([[expert]], dtype=torch.int32), None)
        got = fused_moe_forward_native(layer, StandardDispatchOutput(x, None, routing)).hidden_states[0, :3].tolist()
        try:
            native = moe_forward_native(layer, x, routing, layer.moe_runner_config)[0, :3].tolist()
        except Exception as error:
            native = f"{type(error).__name__}: {error}"
        print(f"{name}, expert {expert}: compiled {got}, native {native}")
