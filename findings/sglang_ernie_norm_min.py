"""ERNIE 4.5's `moe_norm_min` in SGLang, without our suite: run beside 0.5.23.

The sum that weights are divided by is at least this, in the model's own code. SGLang's `Ernie4Moe` does not read it.
Published configs have 1e-12, which only weights of nothing would show.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.ernie4 import Ernie4Moe

config = SimpleNamespace(
    hidden_size=4, hidden_act="silu", moe_num_experts=8, moe_k=2, moe_intermediate_size=4, moe_num_shared_experts=0,
    moe_norm_min=0.9, use_bias=False,
)  # fmt: skip
block = Ernie4Moe(config, layer_id=0)
logits, bias = torch.zeros(1, 8), torch.zeros(1, 8)
block.topk.topk_config.correction_bias.copy_(bias.flatten())
weights = block.topk(torch.zeros(1, 4), logits).topk_weights[0].tolist()
print("two weights of 1/8 each, over their sum or 0.9:", weights, "| want", [0.125 / 0.9] * 2)
