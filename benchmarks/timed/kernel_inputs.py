"""What the kernels are called on, and how much of it is made so that none finds its inputs in the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from floors import works
from model_shapes import Model
from torch import Tensor

from moe_conformance.engine import Aligned
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.grouped_kernel import Dispatched
from moe_conformance.kernels.tuning import Config, Problem, choose

# What a kernel reads beside tokens and routing, to be there before anything is recorded.
READ = {
    "gate_up": ("dispatched",),
    "down": ("dispatched", "hidden"),
    "combine": ("outputs",),
    "capture": ("buffer", "rejected"),
    "unpad": ("wide",),
}
# What all copies together read, in sizes of the last-level cache, and how many copies of small inputs are enough.
CACHES, COPIES = 8, 32


@dataclass(eq=False)
class Batch:
    """One batch of tokens and its routing. What only some kernels read is made when they first ask, and kept."""

    model: Model
    x: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor
    config: Config

    @cached_property
    def aligned(self) -> Aligned:
        return align(self.ids, self.model.experts, self.config.block_m)

    @cached_property
    def dispatched(self) -> Dispatched:
        aligned = self.aligned if self.config.aligned else None
        return Dispatched(self.ids, self.model.experts, self.config.block_m, aligned)

    @cached_property
    def hidden(self) -> Tensor:
        """[R, F], what enters w2."""
        return self._normal(self.ids.numel(), self.model.width)

    @cached_property
    def outputs(self) -> Tensor:
        """[R, D], each pair's expert output at the width of the weights."""
        return self._normal(self.ids.numel(), self.model.columns)

    @cached_property
    def wide(self) -> Tensor:
        return self._normal(len(self.x), self.model.columns)

    @cached_property
    def buffer(self) -> Tensor:
        """[T, L, K], where ids are captured."""
        model, dtype = self.model, torch.uint8 if self.model.experts <= 256 else torch.int16
        return torch.zeros(len(self.x), model.layers, model.top_k, dtype=dtype, device=self.x.device)

    @cached_property
    def rejected(self) -> Tensor:
        return torch.zeros(self.model.layers, dtype=torch.int32, device=self.x.device)

    @property
    def hit(self) -> int:
        """Experts with a pair."""
        return len(self.ids.unique())

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device).normal_()


def make_batch(model: Model, tokens: int, device: str, config: Config | None = None) -> Batch:
    """Every expert as likely as any other, as the floors and published figures have it."""
    x = torch.empty(tokens, model.hidden, dtype=torch.bfloat16, device=device).normal_()
    logits = torch.randn(tokens, model.experts, device=device)
    chosen, ids = logits.topk(model.top_k)
    config = config or choose(problem(model, tokens), x.device)
    return Batch(model, x, logits, ids.int(), chosen.softmax(-1), config)


def problem(model: Model, tokens: int) -> Problem:
    return Problem(
        tokens, model.top_k, model.experts, model.columns, model.width, torch.bfloat16, model.mlp.gated, model.fp8
    )


def make_batches(kernel: str, model: Model, tokens: int, device: str) -> list[Batch]:
    """Copies of the inputs to take in turn. Weights have no copies: other ids read other experts of them."""
    torch.manual_seed(tokens)
    batches = [make_batch(model, tokens, device)]
    moved = sum(work.moved for work in works(kernel, model, tokens, batches[0].hit, batches[0].config.block_m))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    copies = max(2, min(COPIES, math.ceil(CACHES * cache / moved)))
    batches += [make_batch(model, tokens, device) for _ in range(copies - 1)]
    for batch in batches:
        for name in READ.get(kernel, ()):
            getattr(batch, name)
    return batches
