"""LoRA on experts: each expert has its own pair of thin matrices beside each projection, each token its own adapter.

y = W x + scaling * B (A x), or (W + scaling * B A) x where the update is merged. LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.reference_impl.quantised.experts import Project


@dataclass(frozen=True)
class LowRank:
    """The update of one projection of all experts. a: [E, r, in]; b: [E, out, r]; alpha: of the adapter's config.

    rslora: scaled by alpha / sqrt(r) instead of alpha / r (https://arxiv.org/abs/2312.03732).
    Raises InputError where a and b do not fit each other.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.a.ndim != 3 or self.b.ndim != 3 or self.a.shape[:2] != self.b.shape[::2]:
            raise InputError(
                f"LowRank: got a {list(self.a.shape)}, b {list(self.b.shape)}, want [E, r, in], [E, out, r]"
            )

    @property
    def scaling(self) -> float:
        rank = self.a.shape[1]
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def delta(self) -> Tensor:
        """What is added to the weight when merged: [E, out, in]."""
        return self.scaling * (self.b @ self.a)

    def __call__(self, expert: int, rows: Tensor) -> Tensor:
        """What is added to the output: [n, in] -> [n, out]."""
        return self.scaling * F.linear(F.linear(rows, self.a[expert]), self.b[expert])


@dataclass(frozen=True)
class ExpertAdapter:
    """One adapter of a layer's experts; None leaves that projection as it is.

    gate: on w1, the upper half of w13's rows; up: on w3, the lower half, or all of w1 without a gate; down: on w2.
    """

    gate: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None

    def parts(self, name: str) -> tuple[LowRank | None, ...]:
        """The updates that stand above each other in this weight."""
        return {"w13": (self.gate, self.up), "w1": (self.up,), "w2": (self.down,)}[name]


def split_fused(fused: LowRank) -> tuple[LowRank, LowRank]:
    """Gate's and up's updates of one on the fused w13: they share a [E, r, D], b [E, 2F, r] is gate above up."""
    gate, up = fused.b.chunk(2, dim=1)
    return replace(fused, b=gate), replace(fused, b=up)


def from_peft(a: Tensor, b: Tensor, experts: int, alpha: float, rslora: bool = False) -> LowRank:
    """The update that PEFT keeps for a fused weight [E, out, in] (LoraConfig.target_parameters).

    a: [E r, in], the ranks of an expert side by side. b: [out, r E], the experts of a rank side by side.
    Source: ParamWrapper of PEFT 0.21, for parameters whose last dim is the input. Raises InputError for other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) % experts or b.shape[1] != len(a):
        raise InputError(
            f"from_peft: got a {list(a.shape)}, b {list(b.shape)}, want [{experts} r, in], [out, r {experts}]"
        )
    return LowRank(a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts).permute(2, 0, 1), alpha, rslora)


def merge(name: str, weight: Tensor, adapter: ExpertAdapter) -> Tensor:
    """The weight [E, out, in] with the adapter in it, a new tensor."""
    parts = adapter.parts(name)
    slices = weight.chunk(len(parts), dim=1)
    return torch.cat(
        [rows if part is None else rows + part.delta() for rows, part in zip(slices, parts, strict=True)], 1
    )


def with_adapters(base: Project, adapters: Sequence[ExpertAdapter], token_adapter: Tensor) -> Project:
    """`base`, and for each token what its adapter adds; the adapter sees the rows before `base` quantises them.

    token_adapter: [T] integer, the index into `adapters`, -1 for none: such a token's bits are those of `base`.
    Raises InputError for another index.
    """
    known = (token_adapter >= -1) & (token_adapter < len(adapters))
    if not known.all():
        raise InputError(f"token_adapter: got {token_adapter[~known].tolist()}, want -1 or 0 to {len(adapters) - 1}")

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        output = base(name, expert, token, rows)
        for index, adapter in enumerate(adapters):
            own = (token_adapter[token] == index).nonzero().flatten()
            parts = adapter.parts(name)
            for columns, part in zip(output.chunk(len(parts), dim=-1), parts, strict=True):  # views of output
                if part is not None:
                    columns[own] += part(expert, rows[own])
        return output

    return project


def tensor_parallel(adapter: ExpertAdapter, rank: int, ranks: int) -> ExpertAdapter:
    """The share of a rank that holds rows F / ranks of gate and up, and those columns of w2.

    Gate and up keep a whole and a slice of b; down a slice of a and b whole, so that w2's partial outputs, the
    update's among them, add up over ranks.
    """

    def of_b(part: LowRank | None) -> LowRank | None:
        return part and replace(part, b=part.b.chunk(ranks, dim=1)[rank])

    down = adapter.down and replace(adapter.down, a=adapter.down.a.chunk(ranks, dim=2)[rank])
    return ExpertAdapter(of_b(adapter.gate), of_b(adapter.up), down)


def expert_parallel(adapter: ExpertAdapter, held: Tensor) -> ExpertAdapter:
    """The share of a rank that holds these experts: held [n] int64, global ids in local order."""

    def of(part: LowRank | None) -> LowRank | None:
        return part and replace(part, a=part.a[held], b=part.b[held])

    return ExpertAdapter(of(adapter.gate), of(adapter.up), of(adapter.down))
