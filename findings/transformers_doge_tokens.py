"""transformers' Doge MoE and the other tokens of a batch, without our suite: run beside any release that has it.

Its router logits [T, 2 n] are viewed as [2, T, n], not [T, 2, n], so one token's keys come from other tokens' rows: the
first token's output depends on tokens after it, and alone it is another. The comment in 5.23.0 says that this is kept
for the checkpoints, which were trained with it; decoding one token at a time does not do what the full forward does.
For the same view no tokens at all are an error.
"""

import torch
import transformers
from transformers import DogeConfig
from transformers.models.doge.modeling_doge import DogeCDMoE

torch.manual_seed(0)
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_experts_per_tok": 2}
block = DogeCDMoE(DogeConfig(num_experts=16, is_moe=True, **sizes)).eval()
for parameter in block.parameters():
    torch.nn.init.normal_(parameter)
x = torch.randn(1, 4, 8)
with torch.no_grad():
    together = block(x)[0][0, 0]
    changed = block(torch.cat((x[:, :1], -x[:, 1:]), dim=1))[0][0, 0]
    alone = block(x[:, :1])[0][0, 0]
for what, output in (("with three others", together), ("those negated", changed), ("alone", alone)):
    print(transformers.__version__, f"first token, {what}:", [round(v, 2) for v in output.tolist()])
try:
    print(transformers.__version__, "no tokens:", list(block(x[:, :0])[0].shape))
except RuntimeError as error:
    print(transformers.__version__, "no tokens:", error)
