"""`exchange`: ranks that hold their own tokens, and send them to the experts of other ranks and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from moe_conformance.model.specs import MLPSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExchangeInputs:
    """One rank of several that compute a layer together: its own tokens, and its own experts.

    x: [T, D], ids: [T, K] int64 in [0, E) or -1 for a pair that no expert takes, weights: [T, K] float32: of this
    rank's own tokens. T differs from rank to rank, and may be 0.
    mlp: what each expert computes. tensors: of this rank's experts alone, by local id, in x's dtype, as
    `mlp.tensors("experts", D, (n,))` names and shapes them. maps: [ranks, E] int32, every rank's expert map: its local
    id of each expert, or -1 where another rank has it. rank: whose inputs these are.
    shared: an MLP of all tokens, added once to each one's routed sum, whose tensors every rank has.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    mlp: MLPSpec
    tensors: Mapping[str, Tensor]
    maps: Tensor
    rank: int
    shared: MLPSpec | None = None
    shared_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.maps)


class Arrived(NamedTuple):
    """The rows that a rank's experts were given, in any order.

    rows: [R, D] in x's dtype. ids: [R, n] integer, local ids of the experts that a row came for, -1 for none; a row
    may come once for each of its experts, or once for all of them.
    """

    rows: Tensor
    ids: Tensor


class Exchanged(NamedTuple):
    """output: [T, D] in x's dtype, of the rank's own tokens in their order. arrived: for engines with "arrivals"."""

    output: Tensor
    arrived: Arrived | None = None
