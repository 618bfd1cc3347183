"""Experts on several ranks: `expert_map`, `replicate` and `shard`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from moe_conformance.model.specs import MLPSpec
from moe_conformance.protocol.experts import ExpertsInputs
from moe_conformance.protocol.gone import HadOtherFields

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpertMapSpec:
    """Experts to divide among ranks. rank: whose map is asked for. contiguous: each rank has a run of ids, in rank
    order; round_robin: rank r has the ids that are r modulo the number of ranks. A rank's local ids count up from 0 in
    the order of its global ids; other stages take maps in any order."""

    experts: int
    rank: int
    ranks: int
    placement: Literal["contiguous", "round_robin"] = "contiguous"


@dataclass(frozen=True)
class ReplicateInputs:
    """Which of several copies of its expert each pair goes to.

    ids: [T, K] integer, logical ids in [0, E), or -1 for a pair that no expert takes. physical_to_logical: [P] int64,
    the expert that each physical one is a copy of. experts: E. tokens: the number of real rows; the rest are padding.
    """

    ids: Tensor
    physical_to_logical: Tensor
    experts: int
    tokens: int


class Replicated(NamedTuple):
    """ids: [T, K] integer, physical ids, -1 where they were. load: [E] integer, real pairs of each logical expert."""

    ids: Tensor
    load: Tensor


@dataclass(frozen=True)
class ShardInputs(HadOtherFields):
    """A batch that every rank has, all experts, and one rank's place: which of them it holds, and what slice of each.

    whole: the routed sum of the unsharded layer: tensors of all experts, and no expert map of its own.
    expert_map: [E] int32, this rank's local id of each expert, in any order, or -1 where another rank has it; with
    physical_to_logical ([P], the logical expert of each physical one) it is [P], local ids of physical experts.
    ep_rank, ep_size: among the ranks that divide the experts. tp_rank, tp_size: among those that have the same experts
    and divide their width F, not always evenly.
    shared: an MLP of all tokens, added once to the routed sum. shared_tensors: as `shared.tensors("shared", D)` names
    and shapes them, in x's dtype.
    """

    gone: ClassVar[Mapping[str, str]] = {
        "x": "whole.x",
        "ids": "whole.ids",
        "weights": "whole.weights",
        "experts": "whole.mlp",
        "tensors": "whole.tensors",
    }
    whole: ExpertsInputs
    expert_map: Tensor
    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    shared: MLPSpec | None = None
    shared_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    physical_to_logical: Tensor | None = None
