"""Ranks that compute pairs of others, leave out their own, divide experts wrongly, or add twice what is shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import ExpertMapSpec, ExpertsInputs, ShardInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import experts, mlp
from moe_conformance.reference_impl.parallel import experts as stage
from moe_conformance.reference_impl.parallel.expert_map import local_ids
from moe_conformance.reference_impl.parallel.experts import slice_width


class FaultyShard(Faulty):
    """Faulty where there are neither copies nor a shared expert, which have classes of their own."""

    def seen(self, inputs: ShardInputs) -> ShardInputs:
        """What the rank takes its inputs to be."""
        return inputs

    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        """Functions in the stage's module by name, and what stands in for them."""
        return {}

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        """The sum over this rank's experts, whose tensors `inputs` has by local id."""
        return experts(inputs)

    def shard(self, inputs: ShardInputs) -> Tensor:
        if inputs.physical_to_logical is not None or inputs.shared is not None:
            return super().shard(inputs)
        with ExitStack() as stack:
            for name, stand_in in self.replaced(inputs).items():
                stack.enter_context(patch.object(stage, name, stand_in))
            return stage.shard(self.seen(inputs), self.own_sum)


class GlobalIdsAsLocal(FaultyShard):
    """Right on rank 0 with contiguous experts. Ids beyond the rank's experts are dropped, as a kernel's mask does."""

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        ids = inputs.ids.where(inputs.ids < len(inputs.tensors["experts.w2"]), -1)
        return experts(replace(inputs, ids=ids, expert_map=None))


class MinusOneWraps(FaultyShard):
    """-1 indexes the map's last entry, which is an expert on the last rank."""

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        return experts(replace(inputs, ids=inputs.ids.where(inputs.ids != -1, inputs.experts - 1)))


class AnyNegativeWraps(FaultyShard):
    """-1 is honoured; what is further below zero counts from the map's end."""

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        return experts(replace(inputs, ids=inputs.ids.where(inputs.ids >= -1, inputs.ids + inputs.experts)))


class MapAppliedTwice(FaultyShard):
    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        assert inputs.expert_map is not None
        return experts(replace(inputs, ids=local_ids(inputs.ids, inputs.expert_map)))


class LocalOrderIsGlobalOrder(FaultyShard):
    """Weights are loaded in the order of global ids, whatever local ids the map gives."""

    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        return {"held_experts": lambda expert_map: (expert_map >= 0).nonzero().flatten()}


class OthersTimesZero(FaultyShard):
    """Pairs of others run through local expert 0 with a weight of w * 0."""

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        assert inputs.expert_map is not None
        local = local_ids(inputs.ids, inputs.expert_map)
        mine = local >= 0
        if not len(inputs.tensors["experts.w2"]):
            return experts(inputs)
        return experts(replace(inputs, ids=local * mine, weights=inputs.weights * mine, expert_map=None))


class IdleRankReturnsItsBuffer(FaultyShard):
    """A rank without experts returns the output as it was allocated."""

    def own_sum(self, inputs: ExpertsInputs) -> Tensor:
        return experts(inputs) if len(inputs.tensors["experts.w2"]) else torch.empty_like(inputs.x)


class GateAndUpTurnedByTheirShape(FaultyShard):
    """w13 [E, 2F, D] is taken for [E, D, 2F] where it is wider than high."""

    name_of_matrix = "w13"

    def turned(self, rows: int, columns: int) -> bool:
        return rows < columns

    def seen(self, inputs: ShardInputs) -> ShardInputs:
        name = f"experts.{self.name_of_matrix}"
        matrix = inputs.whole.tensors.get(name)
        if matrix is None or not self.turned(*matrix.shape[1:]):
            return inputs
        read = matrix.reshape(len(matrix), matrix.shape[2], matrix.shape[1]).mT
        return replace(inputs, whole=replace(inputs.whole, tensors={**inputs.whole.tensors, name: read}))


class DownTurnedByItsShape(GateAndUpTurnedByTheirShape):
    """w2 [E, D, F] is taken for [E, F, D] where it is wider than high."""

    name_of_matrix = "w2"


class TheLargerDimIsDivided(FaultyShard):
    """Tensor-parallel ranks divide the columns of a w13 that is wider than high."""

    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        def sliced_wrongly(spec: MLPSpec, tensors: stage.Tensors, prefix: str, rank: int, size: int) -> Any:
            narrow, sliced = slice_width(spec, tensors, prefix, rank, size)
            w13 = tensors.get(f"{prefix}.w13")
            if size == 1 or w13 is None or w13.shape[1] >= w13.shape[2]:
                return narrow, sliced
            mine = torch.arange(w13.shape[2]) * size // w13.shape[2] == rank
            return spec, {**tensors, f"{prefix}.w13": w13 * mine} | {
                n: t for n, t in sliced.items() if n.endswith("b2")
            }

        return {"slice_width": sliced_wrongly}


class DownBiasOnEveryTensorRank(FaultyShard):
    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        def sliced_wrongly(spec: MLPSpec, tensors: stage.Tensors, prefix: str, *rank: int) -> Any:
            narrow, sliced = slice_width(spec, tensors, prefix, *rank)
            whole = {f"{prefix}.b2": tensors[f"{prefix}.b2"]} if spec.bias else {}
            return narrow, sliced | whole

        return {"slice_width": sliced_wrongly}


class GateAndUpSlicedAsOne(FaultyShard):
    """The first rank gets all of gate, the second all of up."""

    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        def sliced_wrongly(spec: MLPSpec, tensors: stage.Tensors, prefix: str, rank: int, size: int) -> Any:
            narrow, sliced = slice_width(spec, tensors, prefix, rank, size)
            if size > 1 and spec.gated:
                sliced[f"{prefix}.w13"] = tensors[f"{prefix}.w13"].narrow(1, 2 * narrow.width * rank, 2 * narrow.width)
            return narrow, sliced

        return {"slice_width": sliced_wrongly}


class WidthLeftOver(FaultyShard):
    """F // tp a rank, so that the last columns are nobody's."""

    def replaced(self, inputs: ShardInputs) -> Mapping[str, Callable[..., Any]]:
        return {"even_split": lambda total, parts: [total // parts] * parts}


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


class MapInBytes(Faulty):
    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        return super().expert_map(spec).to(torch.int8)


class MapEndsAt512(Faulty):
    """A table of 512 entries; what lies behind it is on no rank."""

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        return super().expert_map(spec).where(torch.arange(spec.experts) < 512, -1)


class SharedOnEveryRank(Faulty):
    """Added before the sum over ranks, which then holds it as often as there are ranks."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        shared = inputs.shared
        if shared is None:
            return super().shard(inputs)
        with patch.object(stage, "mlp", lambda x, spec, tensors, prefix: mlp(x, shared, inputs.shared_tensors, prefix)):
            return super().shard(inputs)


_SUM = "parts_sum_to_the_layer"
_ZERO = "pairs_of_others_contribute_exactly_zero"
_PLACE = "every_expert_has_one_place"
# Classes whose cases judge whole parts: what is wrong in any is wrong in theirs.
_PARTS = frozenset(
    {"chunking", "determinism-state", "dtype-stride-arguments", "unwritten-output", "weight-orientation"}
)

MUTANTS = (
    Mutant(
        GlobalIdsAsLocal,
        "expert-map",
        "global ids are used as local ones (vllm-gaudi#1796)",
        ("shard-ep3-contiguous", _SUM),
        also=_PARTS,
    ),
    Mutant(
        MinusOneWraps,
        "expert-map",
        "an id of -1 wraps to the last expert (vllm#46408)",
        ("shard-nothing-of-dropped", _ZERO),
        also=_PARTS,
    ),
    Mutant(
        AnyNegativeWraps,
        "expert-map",
        "ids below -1 wrap",
        ("shard-out-of-range-minus-2", "ids_out_of_range_never_name_an_expert"),
        also=_PARTS,
    ),
    Mutant(MapAppliedTwice, "expert-map", "the map is applied twice", ("shard-ep3-scattered", _SUM), also=_PARTS),
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
        also=_PARTS,
    ),
    Mutant(
        IdleRankReturnsItsBuffer,
        "expert-map",
        "a rank without experts returns uninitialised memory",
        ("shard-ep3-empty-rank", _SUM),
        also=_PARTS,
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
        GateAndUpTurnedByTheirShape,
        "expert-map",
        "w13 is transposed where it is wider than high",
        ("shard-ep3-narrow", _SUM),
        also=_PARTS,
    ),
    Mutant(
        DownTurnedByItsShape,
        "weight-orientation",
        "w2 is transposed where it is wider than high",
        ("shard-ep3-wide", "no_shape_decides_a_layout"),
        also=_PARTS | {"expert-map"},
    ),
    Mutant(
        TheLargerDimIsDivided,
        "expert-map",
        "ranks divide w13's columns where it is wider than high",
        ("shard-tp2-narrow", _SUM),
    ),
    Mutant(MapInBytes, "expert-map", "local ids are kept in int8", ("expert-map-contiguous-896-on-5", _PLACE)),
    Mutant(MapEndsAt512, "expert-map", "the map has 512 entries", ("expert-map-round-robin-896-on-5", _PLACE)),
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
