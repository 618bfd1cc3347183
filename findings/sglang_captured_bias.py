"""SGLang's selection bias, without our suite: run beside 0.5.23.

A TopK keeps the very Parameter that it was built with. torch.func.functional_call, load_state_dict(assign=True) and a
Parameter that is put in its place change the module's, and not the bias that tokens are routed with.
"""

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat


class Block(torch.nn.Module):
    """As Glm4MoeSparseMoeBlock and others have it."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([9.0, 0.0, 0.0, 0.0]), requires_grad=False)
        arguments = {
            "scoring_func": "sigmoid",
            "correction_bias": self.bias,
            "output_format": TopKOutputFormat.STANDARD,
        }
        self.topk = TopK(1, layer_id=0, **arguments)

    def forward(self, logits):
        return self.topk(logits, logits).topk_ids.tolist()


block, logits, bias = Block(), torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 9.0])
print("built with a bias for expert 0:", block(logits))
print("functional_call with one for expert 3:", torch.func.functional_call(block, {"bias": bias}, (logits,)))
block.load_state_dict({"bias": bias}, assign=True)
print("load_state_dict(assign=True) with one for expert 3:", block(logits), "and the module has", block.bias.tolist())
