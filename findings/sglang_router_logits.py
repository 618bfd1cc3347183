"""Router logits in SGLang, without our suite: run beside 0.5.23.

The code of DeepSeek's and Bailing's models has them in float32. SGLang's gate for DeepSeek multiplies in bfloat16 on a
CPU (on a GPU by `linear_bf16_fp32`). Its gate for Bailing and Sarvam multiplies in float32, as `router_dtype` says, and
then rounds to the dtype of the hidden states everywhere. The gates of Kimi-Linear and EXAONE-MoE are linear layers in
the model's dtype.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.bailing_moe import BailingMoEGate
from sglang.srt.models.deepseek_v2 import MoEGate

torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = SimpleNamespace(n_routed_experts=8, hidden_size=64, topk_method="noaux_tc", architectures=["DeepseekV3"])
config.num_experts, config.moe_router_enable_expert_bias = 8, True
x = torch.randn(4, 64)
for name, gate in {
    "DeepSeek": MoEGate(config, quant_config=None),
    "Bailing": BailingMoEGate(config, params_dtype=torch.float32),
}.items():
    gate.weight.copy_(torch.randn(8, 64) * 0.2)
    logits, want = gate(x), x.float() @ gate.weight.float().T
    print(name, logits.dtype, "off by", float((logits.float() - want).abs().max()), "| want float32")
