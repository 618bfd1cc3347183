"""transformers' NLLB-MoE and its experts, without our suite: run beside any release.

Every expert answers with its number, so a token's output is the sum of weight times number over its two experts. In
4.57.1 it is. In 5.23.0 the one-hot mask of first choices is taken for a list of ids: expert 1 runs for every first
choice and expert 0 for every other pair, whatever the router chose.
"""

import torch
import transformers
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

sizes = {"d_model": 8, "encoder_ffn_dim": 4, "num_experts": 6, "expert_capacity": 64, "moe_token_dropout": 0.0}
torch.manual_seed(0)
block = NllbMoeSparseMLP(NllbMoeConfig(**sizes), 4).eval()
for number in range(6):
    block.experts[f"expert_{number}"].fc2.weight.data.zero_()
    block.experts[f"expert_{number}"].fc2.bias.data.fill_(float(number))
torch.nn.init.normal_(block.router.classifier.weight)
x = torch.randn(1, 5, 8)
with torch.no_grad():
    weights = block.router(x[0] if transformers.__version__ >= "5" else x, None)[1]
    answer = block(x, None)
got = (answer[0] if isinstance(answer, tuple) else answer)[0, :, 0]
for token in range(5):
    chosen = {e: round(float(w), 3) for e, w in enumerate(weights[token]) if w}
    want = sum(e * w for e, w in chosen.items())
    print(transformers.__version__, f"token {token}, experts {chosen}: want {want:.3f}, got {got[token]:.3f}")
