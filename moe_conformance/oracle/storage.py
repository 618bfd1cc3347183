"""Which tensors a path stores in which dtype: the storage policy that a bound is derived for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_conformance.oracle.precision import wide


@dataclass(frozen=True)
class Storage:
    """In which dtype a path stores what it computes, in data order. Sums of products run in `compute`.

    x: what enters an expert, where that is not the layer's own input (latent projection, norm, x times weight).
    hidden: gate and up. activation: what a path that calls one operation after another stores inside the activation.
    activated: what enters w2. expert: an expert's output. weights: routing weights. weighted: output times weight.
    total: the sum over a token's experts. result: everything after that sum.
    """

    compute: torch.dtype
    x: torch.dtype
    hidden: torch.dtype
    activation: torch.dtype
    activated: torch.dtype
    expert: torch.dtype
    weights: torch.dtype
    weighted: torch.dtype
    total: torch.dtype
    result: torch.dtype

    @classmethod
    def stored(cls, dtype: torch.dtype) -> Storage:
        """Every tensor is stored in dtype, the running sum over experts included: as eager transformers does.

        The loosest policy that engines have, so the one for an engine whose kernels are not known.
        """
        return cls(wide(dtype), dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype)

    @classmethod
    def fused(cls, dtype: torch.dtype) -> Storage:
        """Kernels that store gate and up, what enters w2, and the result in dtype, and keep all else in `compute`."""
        kept = wide(dtype)
        return replace(cls.stored(dtype), activation=kept, expert=kept, weights=kept, weighted=kept, total=kept)

    def origin(self, what: str) -> str:
        """For the messages of a bound."""
        kept = f"gate and up stored in {self.hidden}, running sum in {self.total}, result in {self.result}"
        return f"roundings carried through the {what}: sums in {self.compute}, {kept}"
