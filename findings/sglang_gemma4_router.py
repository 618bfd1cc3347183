"""Gemma 4's router in SGLang, without our suite: run beside 0.5.23.

`fuse_scale` folds `router.scale` and 1 / sqrt(hidden_size) into the weight of a norm that was made without one. A GPU's
kernel multiplies by that weight; `forward_native`, which a CPU and ROCm run, does not, so that the router has no scale.
It folds once, at the first step: a scale that is pushed later changes nothing.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.gemma4_causal import Gemma4Router

config = SimpleNamespace(hidden_size=4, num_experts=4, rms_norm_eps=1e-6)
router = Gemma4Router(config)
router.proj.weight.copy_(torch.eye(4))
router.scale.copy_(torch.tensor([1.0, 0.0, 0.0, 8.0]))
x = torch.tensor([[1.0, 2.0, 3.0, 0.5]])


def want():
    return (x * torch.rsqrt(x.square().mean() + 1e-6) * router.scale * 4**-0.5)[0].tolist()


print("logits:", router(x)[0].tolist(), "| want", want())
print("the norm's weight:", router.norm.weight.tolist())
router.scale.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
router(x)
print("behind another scale:", router.norm.weight.tolist(), "| want", (router.scale * 4**-0.5).tolist())
