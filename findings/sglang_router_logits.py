"""DeepSeek's router logits in SGLang on a CPU, without our suite: run beside 0.5.23.

The model's own code computes them in float32 of bfloat16 hidden states and weights, and so does SGLang on a GPU
(`linear_bf16_fp32`). On a CPU they are bfloat16: rounded, and so are the weights of experts. The gates of Kimi-Linear
and EXAONE-MoE are linear layers in the model's dtype everywhere.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.deepseek_v2 import MoEGate

torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = SimpleNamespace(n_routed_experts=8, hidden_size=64, topk_method="noaux_tc", architectures=["DeepseekV3"])
gate = MoEGate(config, quant_config=None)
gate.weight.copy_(torch.randn(8, 64) * 0.2)
x = torch.randn(4, 64)
logits, want = gate(x), x.float() @ gate.weight.float().T
print("logits", logits.dtype, "off by", float((logits.float() - want).abs().max()), "| want float32")
