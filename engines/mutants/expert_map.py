"""Ranks that compute pairs of others, leave out their own, divide experts wrongly, or add twice what is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import ExpertMapSpec, ShardInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import mlp, routed_experts
from moe_conformance.reference_impl.parallel import experts as stage
from moe_conformance.reference_impl.parallel.expert_map import local_ids
from moe_conformance.reference_impl.parallel.experts import slice_width


class FaultyShard(Faulty):
    """Faulty where there are neither copies nor a shared expert, which have classes of their own."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        """The name of a function in the stage's module, and what stands in for it."""
        raise NotImplementedError

    def shard(self, inputs: ShardInputs) -> Tensor:
        if inputs.physical_to_logical is not None or inputs.shared is not None:
            return super().shard(inputs)
        with patch.object(stage, *self.fault(inputs)):
            return super().shard(inputs)


class GlobalIdsAsLocal(FaultyShard):
    """Right on rank 0 with contiguous experts. Ids beyond the rank's experts are dropped, as a kernel's mask does."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        count = int((inputs.expert_map >= 0).sum())
        return "local_ids", lambda ids, expert_map: torch.where((ids >= 0) & (ids < count), ids, count)


class MinusOneWraps(FaultyShard):
    """-1 indexes the map's last entry, which is an expert on the last rank."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def wrapped(ids: Tensor, expert_map: Tensor) -> Tensor:
            return local_ids(torch.where(ids == -1, len(expert_map) - 1, ids), expert_map)

        return "local_ids", wrapped


class AnyNegativeWraps(FaultyShard):
    """-1 is honoured; what is further below zero counts from the map's end."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def wrapped(ids: Tensor, expert_map: Tensor) -> Tensor:
            return local_ids(torch.where(ids < -1, ids + len(expert_map), ids), expert_map)

        return "local_ids", wrapped


class MapAppliedTwice(FaultyShard):
    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def wrapped(ids: Tensor, expert_map: Tensor) -> Tensor:
            return local_ids(torch.where(ids >= 0, expert_map.long()[ids], -1), expert_map)

        return "local_ids", wrapped


class LocalOrderIsGlobalOrder(FaultyShard):
    """Weights are loaded in the order of global ids, whatever local ids the map gives."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        return "held_experts", lambda expert_map: (expert_map >= 0).nonzero().flatten()


class OthersTimesZero(FaultyShard):
    """Pairs of others run through local expert 0 with a weight of w * 0."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def routed(x: Tensor, spec: MLPSpec, tensors: stage.Tensors, ids: Tensor, weights: Tensor) -> Tensor:
            mine = ids < len(tensors["experts.w2"])
            return routed_experts(x, spec, tensors, ids * mine, weights * mine)

        return "routed_experts", routed


class IdleRankReturnsItsBuffer(FaultyShard):
    """A rank without experts returns the output as it was allocated."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        idle = not (inputs.expert_map >= 0).any()
        return "experts_part", (lambda x, *_: torch.empty_like(x)) if idle else stage.experts_part


class DownBiasOnEveryTensorRank(FaultyShard):
    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def sliced_wrongly(spec: MLPSpec, tensors: stage.Tensors, prefix: str, *rank: int) -> Any:
            narrow, sliced = slice_width(spec, tensors, prefix, *rank)
            whole = {f"{prefix}.b2": tensors[f"{prefix}.b2"]} if spec.bias else {}
            return narrow, sliced | whole

        return "slice_width", sliced_wrongly


class GateAndUpSlicedAsOne(FaultyShard):
    """The first rank gets all of gate, the second all of up."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        def sliced_wrongly(spec: MLPSpec, tensors: stage.Tensors, prefix: str, rank: int, size: int) -> Any:
            narrow, sliced = slice_width(spec, tensors, prefix, rank, size)
            if size > 1 and spec.gated:
                sliced[f"{prefix}.w13"] = tensors[f"{prefix}.w13"].narrow(1, 2 * narrow.width * rank, 2 * narrow.width)
            return narrow, sliced

        return "slice_width", sliced_wrongly


class WidthLeftOver(FaultyShard):
    """F // tp a rank, so that the last columns are nobody's."""

    def fault(self, inputs: ShardInputs) -> tuple[str, Callable[..., Any]]:
        return "even_split", lambda total, parts: [total // parts] * parts


class LastExpertsAreNobodys(Faulty):
    """E // ranks experts each."""

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        return super().expert_map(spec).where(torch.arange(spec.experts) < spec.experts // spec.ranks * spec.ranks, -1)


class LeftOverExpertsOnLastRank(Faulty):
    """E // ranks experts each, and the last rank has the rest as well."""

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        size = spec.experts // spec.ranks
        if spec.placement == "round_robin" or not size:
            return super().expert_map(spec)
        ids = torch.arange(spec.experts)
        owner = (ids // size).clamp(max=spec.ranks - 1)
        return torch.where(owner == spec.rank, ids - size * spec.rank, -1)


class SharedOnEveryRank(Faulty):
    """Added before the sum over ranks, which then holds it as often as there are ranks."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        shared = inputs.shared
        if shared is None:
            return super().shard(inputs)
        with patch.object(stage, "mlp", lambda x, spec, tensors, prefix: mlp(x, shared, inputs.tensors, prefix)):
            return super().shard(inputs)


_SUM = "parts_sum_to_the_layer"
_ZERO = "pairs_of_others_contribute_exactly_zero"
_PLACE = "every_expert_has_one_place"

MUTANTS = (
    Mutant(
        GlobalIdsAsLocal,
        "expert-map",
        "global ids are used as local ones (vllm-gaudi#1796)",
        ("shard-ep3-contiguous", _SUM),
    ),
    Mutant(
        MinusOneWraps,
        "expert-map",
        "an id of -1 wraps to the last expert (vllm#46408)",
        ("shard-nothing-of-others", _ZERO),
    ),
    Mutant(
        AnyNegativeWraps,
        "expert-map",
        "ids below -1 wrap",
        ("shard-out-of-range-minus-2", "ids_out_of_range_never_name_an_expert"),
    ),
    Mutant(MapAppliedTwice, "expert-map", "the map is applied twice", ("shard-ep3-scattered", _SUM)),
    Mutant(
        LocalOrderIsGlobalOrder,
        "expert-map",
        "weights lie in the order of global ids, local ids do not",
        ("shard-ep3-scattered", _SUM),
    ),
    Mutant(
        OthersTimesZero,
        "expert-map",
        "pairs of others are computed and multiplied by zero",
        ("shard-nothing-of-others-poison", _ZERO),
    ),
    Mutant(
        IdleRankReturnsItsBuffer,
        "expert-map",
        "a rank without experts returns uninitialised memory",
        ("shard-ep3-empty-rank", _SUM),
    ),
    Mutant(
        DownBiasOnEveryTensorRank,
        "expert-map",
        "b2 is added on every rank that has a slice of the expert",
        ("shard-tp2-bias", _SUM),
    ),
    Mutant(GateAndUpSlicedAsOne, "expert-map", "w13 is sliced as one block", ("shard-tp2", _SUM)),
    Mutant(
        WidthLeftOver,
        "expert-map",
        "the columns that do not divide evenly are on no rank",
        ("shard-tp3-uneven", _SUM),
    ),
    Mutant(
        LastExpertsAreNobodys,
        "expert-map",
        "the experts that do not divide evenly are on no rank",
        ("expert-map-contiguous-11-on-3", _PLACE),
    ),
    Mutant(
        LeftOverExpertsOnLastRank,
        "expert-map",
        "the last rank has all experts that do not divide evenly (vllm#21497)",
        ("expert-map-contiguous-63-on-8", _PLACE),
    ),
    Mutant(
        SharedOnEveryRank,
        "shared-experts",
        "the replicated shared output is added before the sum over ranks (sglang#31475)",
        ("shard-shared-ep3", "shared_output_is_added_once"),
    ),
)
