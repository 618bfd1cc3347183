"""Gemma 4's router in SGLang on a CPU and its learned scale, without our suite: run beside 0.5.20 or later.

The router folds `scale` into the weight of a norm that was made without one. On a CPU that norm does not multiply by
its weight: the scale, and 1 / sqrt(hidden size) with it, is lost, and other experts are chosen.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.gemma4_causal import Gemma4Router

router = Gemma4Router(SimpleNamespace(hidden_size=4, rms_norm_eps=1e-6, num_experts=2))
router.proj.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
router.scale.data.copy_(torch.tensor([1.0, 100.0, 1.0, 1.0]))
x = torch.ones(1, 4)
print("want logits 0.5 and 50, of a root mean square of 1 and a hidden size of 4; got", router(x).tolist())
