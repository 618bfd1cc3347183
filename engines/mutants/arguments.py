"""Engines that read an argument as if it had other strides, or another dtype, than it has."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import (
    AlignInputs,
    BlockInputs,
    BlockOutput,
    ExpertsInputs,
    LayerInputs,
    RouteInputs,
    Routing,
    ShardInputs,
    SharedSpec,
)
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.engines.mutants.permutation import FaultyIds
from moe_conformance.reference_impl import layer as stage
from moe_conformance.reference_impl.layer import Tensors


def as_if_contiguous(tensor: Tensor) -> Tensor:
    """As a kernel sees it that gets a pointer and no strides; what lies outside the memory is NaN."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    return as_if_strided(tensor, strides)


def as_if_strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    memory = tensor.untyped_storage().nbytes() // tensor.element_size()
    places = torch.full(tensor.shape, int(tensor.storage_offset()))
    for dim, (size, stride) in enumerate(zip(tensor.shape, strides, strict=True)):
        places += (torch.arange(size) * stride).view(-1, *[1] * (tensor.ndim - 1 - dim))
    flat = tensor.as_strided((memory,), (1,), 0)
    found = flat[places.clamp(max=max(memory - 1, 0))]
    return found.masked_fill(places >= memory, float("nan") if tensor.is_floating_point() else -1)


def legal(ids: Tensor, inputs: ExpertsInputs) -> Tensor:
    """What is read for an id and is none has no expert."""
    return ids.masked_fill((ids < 0) | (ids >= inputs.experts + inputs.identity_experts), -1)


class RowsTakenForContiguous(Faulty):
    """In bfloat16 alone."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.x.dtype != torch.bfloat16:
            return super().experts(inputs)
        return super().experts(replace(inputs, x=as_if_contiguous(inputs.x)))


class IdsTakenForContiguous(Faulty):
    """Where one rank has all experts."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is not None or inputs.native_ids:
            return super().experts(inputs)
        return super().experts(replace(inputs, ids=legal(as_if_contiguous(inputs.ids), inputs)))


class WeightsWithTheStridesOfIds(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        weights = inputs.weights
        if weights.shape == inputs.ids.shape and len(weights) > 1:
            weights = as_if_strided(weights, inputs.ids.stride())
        return super().experts(replace(inputs, weights=weights))


class StepBetweenColumnsIgnored(Faulty):
    """The row stride of x is handed to the kernel, and the other is taken to be 1."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        x = inputs.whole.x
        return super().shard(replace(inputs, whole=replace(inputs.whole, x=as_if_strided(x, (x.stride(0), 1)))))


class ExpertStrideOfW2(Faulty):
    """Liger-Kernel#1377: the stride of an expert is taken to be the product of its dims."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        w2 = inputs.tensors["experts.w2"]
        if inputs.quant or inputs.padded_hidden or inputs.padded_intermediate or w2.numel() > 1 << 16:
            return super().layer(inputs)
        packed = as_if_strided(w2, (w2.shape[1] * w2.shape[2], *w2.stride()[1:]))
        return super().layer(replace(inputs, tensors={**inputs.tensors, "experts.w2": packed}))


class MapTakenForContiguous(Faulty):
    """torchtitan#3771: what is looked up by expert is read by pointer and number."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is None:
            return super().experts(inputs)
        held = len(inputs.tensors["experts.w2"])
        packed = as_if_contiguous(inputs.expert_map)
        return super().experts(replace(inputs, expert_map=packed.where(packed < held, -1)))


class GateReadsContiguousRows(Faulty):
    """vllm#43190: the kernel of the shared expert's gate takes the row stride of x for its width."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.shared is None or not inputs.spec.shared.gate:
            return super().layer(inputs)
        real = stage.shared_output

        def gated(x: Tensor, spec: SharedSpec, tensors: Tensors, weights: Tensor | None) -> Tensor:
            open_ = F.linear(as_if_contiguous(x), tensors["shared.gate"]).sigmoid()
            return real(x, replace(spec, gate=False), tensors, weights) * open_

        with patch.object(stage, "shared_output", gated):
            return super().layer(inputs)


class NarrowIdsReadWide(Faulty):
    """aiter#5255 the other way round: int32 ids are read in pairs."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.ids.dtype != torch.int32 or inputs.native_ids:
            return super().experts(inputs)
        flat = inputs.ids.flatten().long()
        return super().experts(
            replace(inputs, ids=flat.where(torch.arange(len(flat)) % 2 == 0, -1).view_as(inputs.ids))
        )


class LogitsOfOneRow(Faulty):
    """A batch of one row is read from its memory: a copy is made only for more."""

    def route(self, inputs: RouteInputs) -> Routing:
        if len(inputs.logits) != 1:
            return super().route(inputs)
        return super().route(replace(inputs, logits=as_if_contiguous(inputs.logits)))


class StridesAreIgnored(FaultyIds):
    """Ids are read as if one lay behind the other; what names no expert is dropped."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        ids = inputs.ids.as_strided(inputs.ids.shape, (inputs.ids.shape[1], 1))
        return ids.where((ids >= 0) & (ids < inputs.experts), -1)


class SequencesBehindTokens(Faulty):
    """x is flattened by its memory."""

    def block(self, inputs: BlockInputs) -> BlockOutput:
        return super().block(replace(inputs, x=as_if_contiguous(inputs.x)))


_CHECK = "arguments_are_read_as_given"
# Rows far apart have strides, too, and so have some logits of the methods' cases.
_ALSO = frozenset({"index-width", "routing-semantics"})

MUTANTS = tuple(
    Mutant(engine, "dtype-stride-arguments", fault, (case, _CHECK), _ALSO)
    for engine, fault, case in (
        (RowsTakenForContiguous, "x is read as if contiguous in bfloat16", "experts-x-columns-bf16"),
        (IdsTakenForContiguous, "ids are read as if contiguous", "experts-x-columns"),
        (WeightsWithTheStridesOfIds, "weights are read with the strides of ids", "experts-x-columns"),
        (StepBetweenColumnsIgnored, "the column stride of x is taken to be 1", "shard-x-sliced-tp2"),
        (ExpertStrideOfW2, "the expert stride of w2 is that of packed experts", "layer-arguments-transposed-shared"),
        (NarrowIdsReadWide, "int32 ids are read as int64", "experts-ids-int32-bf16"),
        (MapTakenForContiguous, "an expert map is read as if contiguous", "experts-map-sliced-ep3"),
        (GateReadsContiguousRows, "the shared gate reads x as if contiguous", "layer-arguments-shared-gate-shared"),
        (LogitsOfOneRow, "one row of logits is read as if contiguous", "route-renorm-e128-k8-t1-bf16-fine-sliced"),
        (StridesAreIgnored, "ids are read as if contiguous", "align-rows-apart"),
        (SequencesBehindTokens, "x is flattened as it lies in memory", "family-mixtral-x-swapped"),
    )
)
