"""Engines whose answer is not of the call alone: of fresh memory, of earlier calls, of the rows beside a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.engine import Aligned, AlignInputs, ExpertsInputs, LayerInputs, RouteInputs, Routing, ShardInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.engines.mutants.permutation import PaddingIsLeftUnwritten


def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


# --- what fresh memory holds


class RowsWithoutExpertUnwritten(Faulty):
    """The output is made by torch.empty, and only rows with an expert are added to it."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        idle = (inputs.ids < 0).all(-1, keepdim=True)
        return torch.where(idle, torch.empty_like(output), output)


class TailOfOneToken(Faulty):
    """The kernel for one token writes whole vectors of eight columns."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        if len(output) != 1 or inputs.x.itemsize != 2:
            return output
        whole = output.shape[1] // 8 * 8
        written = torch.empty_like(output)
        written[:, :whole] = output[:, :whole]
        return written


class IdleRankUnwritten(Faulty):
    def shard(self, inputs: ShardInputs) -> Tensor:
        if inputs.physical_to_logical is None and bool((inputs.expert_map < 0).all()):
            return torch.empty_like(inputs.whole.x)
        return super().shard(inputs)


class NoKernelOfThisSize(Faulty):
    """flashinfer#3840: where there is none for E and K, it warns and launches nothing."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.logits.shape[1] <= 512 or inputs.routing.top_k <= 16:
            return Routing(ids, weights)
        return Routing(torch.empty_like(ids), torch.empty_like(weights))


class NoMemoryForScores(Faulty):
    """TransformerEngine#2821: with so many experts a row's scores do not fit, and the launch fails without a word."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.logits.shape[1] < 1024:
            return Routing(ids, weights)
        return Routing(torch.empty_like(ids), torch.empty_like(weights))


class RowsOfOneBlock(Faulty):
    """mirage#764: the router visits the rows of one block, 16 for 128 experts."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        rows = 8 * max(1, 256 // max(1, inputs.logits.shape[1]))
        for part in (ids, weights):
            part[rows:] = torch.empty_like(part[rows:])
        return Routing(ids, weights)


class CountOfNothing(Faulty):
    """Without a pair the kernel returns before it has written how many slots are in use."""

    def align(self, inputs: AlignInputs) -> Aligned:
        found = super().align(inputs)
        if int(found.padded_count):
            return found
        return found._replace(padded_count=torch.empty_like(found.padded_count))


class LastRowOfNarrowLayer(Faulty):
    """In bfloat16 rows are written two at a time."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        if inputs.x.dtype == torch.bfloat16 and len(output) % 2 and inputs.padded_hidden is None:
            output[-1] = torch.empty_like(output[-1])
        return output


# --- what earlier calls left


class WithMemory(Faulty):
    """An engine that keeps something between calls."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}


class WeightsCachedByShape(WithMemory):
    """Weights are prepared once for each shape."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        w2 = inputs.tensors["experts.w2"]
        key = (tuple(inputs.tensors), w2.shape, w2.dtype)
        return super().experts(replace(inputs, tensors=self.kept.setdefault(key, inputs.tensors)))


class StaysInTwoBytes(WithMemory):
    """After a call in bfloat16 inputs are stored in it."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        narrow = self.kept.setdefault("narrow", set())
        if inputs.x.dtype == torch.bfloat16:
            narrow.add(True)
        x = inputs.x / 3
        return super().experts(replace(inputs, x=x.bfloat16().to(x.dtype) * 3 if narrow else inputs.x))


class WorkspaceOfTheLargestBatch(WithMemory):
    """Results stay in a workspace as large as the largest batch so far, and its last row is not written again."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        key = (output.shape[1], output.dtype)
        if len(output) < len(self.kept.get(key, ())) and len(output) > 1:
            output[-1] = self.kept[key][len(output) - 1]
        elif len(output) >= len(self.kept.get(key, ())):
            self.kept[key] = output.clone()
        return output


class BiasOfTheFirstRouter(WithMemory):
    """The selection bias of the first router of a size is kept for all."""

    def route(self, inputs: RouteInputs) -> Routing:
        bias = inputs.tensors.get("router.selection_bias")
        if bias is None:
            return super().route(inputs)
        tensors = {**inputs.tensors, "router.selection_bias": self.kept.setdefault(len(bias), bias)}
        return super().route(replace(inputs, tensors=tensors))


class SharedExpertOfTheFirstLayer(WithMemory):
    def layer(self, inputs: LayerInputs) -> Tensor:
        own = {name: tensor for name, tensor in inputs.tensors.items() if name.startswith("shared.")}
        if not own:
            return super().layer(inputs)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in own.items())
        return super().layer(replace(inputs, tensors={**inputs.tensors, **self.kept.setdefault(key, own)}))


class EveryOtherCallInDouble(WithMemory):
    """Right each time, and another kernel every other time."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        self.kept["calls"] = self.kept.get("calls", 0) + 1
        if self.kept["calls"] % 2 or inputs.quant is not None or inputs.lora is not None:
            return super().experts(inputs)
        exact = super().experts(replace(inputs, x=inputs.x.double(), tensors=wide(inputs.tensors)))
        return exact.to(inputs.x.dtype)


class EveryOtherLayerInDouble(Faulty):
    def __init__(self) -> None:
        self.calls = 0

    def layer(self, inputs: LayerInputs) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            return super().layer(inputs)
        tensors = wide(inputs.tensors)
        return super().layer(replace(inputs, x=inputs.x.double(), tensors=tensors)).to(inputs.x.dtype)


# --- what the rows beside a row are


class InvariantInDouble(Faulty):
    """Invariant of the batch, for float64 leaves nothing of the order of sums behind; it says so."""

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        offered = dict(super().capabilities())
        for stage in ("experts", "layer"):
            offered[stage] |= {"batch_invariant"}
        return offered

    def in_double(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is not None or inputs.lora is not None:
            return super().experts(inputs)
        exact = super().experts(replace(inputs, x=inputs.x.double(), tensors=wide(inputs.tensors)))
        return exact.to(inputs.x.dtype)

    def layer_in_double(self, inputs: LayerInputs) -> Tensor:
        if inputs.quant is not None:
            return super().layer(inputs)
        exact = super().layer(replace(inputs, x=inputs.x.double(), tensors=wide(inputs.tensors)))
        return exact.to(inputs.x.dtype)


class SmallBatchesInFloat32(InvariantInDouble):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return Faulty.experts(self, inputs) if len(inputs.x) <= 16 else self.in_double(inputs)


class RowsBehindTheLastTile(InvariantInDouble):
    """Rows that fill no tile of 16 get a kernel of their own."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output, rows = self.in_double(inputs), len(inputs.x) // 16 * 16
        if inputs.x.dtype == torch.float32:
            output[rows:] = Faulty.experts(self, inputs)[rows:]
        return output


class OneTokenStoresEachExpert(InvariantInDouble):
    """With one token in bfloat16 each expert's output is stored before it is added."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if len(inputs.x) != 1 or inputs.x.dtype != torch.bfloat16:
            return self.in_double(inputs)
        total = torch.zeros(inputs.x.shape, dtype=torch.bfloat16)
        for k in range(inputs.ids.shape[1]):
            total += self.in_double(replace(inputs, ids=inputs.ids[:, [k]], weights=inputs.weights[:, [k]]))
        return total


class LayerOfFewTokens(InvariantInDouble):
    def layer(self, inputs: LayerInputs) -> Tensor:
        return Faulty.layer(self, inputs) if len(inputs.x) < 12 else self.layer_in_double(inputs)


class SoftmaxOfOneRow(Faulty):
    """One row of logits takes a kernel that sums in float64."""

    def route(self, inputs: RouteInputs) -> Routing:
        if len(inputs.logits) != 1 or inputs.routing.score_dtype == "input":
            return super().route(inputs)
        ids, weights = super().route(replace(inputs, logits=inputs.logits.double()))
        return Routing(ids, weights.float())


_WRITTEN = "every_element_is_written"
_BETWEEN = "another_call_between_leaves_no_trace"
_SECOND = "a_second_run_gives_the_same_bits"
_BATCH = "rows_keep_their_bits_in_any_batch"
# What is not written, or is of another call, is wrong wherever values are looked at.
_ANY = frozenset(BUG_CLASSES)

MUTANTS = tuple(
    Mutant(engine, bug_class, fault, (case, check), also)
    for bug_class, check, also, rows in (
        (
            "unwritten-output",
            _WRITTEN,
            _ANY,
            (
                (
                    RowsWithoutExpertUnwritten,
                    "rows without expert are not written",
                    "experts-written-rows-without-expert",
                ),
                (TailOfOneToken, "one token's last columns are not written", "experts-written-one-token-fp16"),
                (IdleRankUnwritten, "a rank without experts writes nothing", "shard-written-empty-rank"),
                (NoKernelOfThisSize, "wide routers write nothing", "route-biased-e896-k22-t3-fp32-fine"),
                (NoMemoryForScores, "1024 experts write nothing", "route-renorm-e1280-k8-t5-fp32-fine"),
                (RowsOfOneBlock, "rows behind the first block are not written", "route-renorm-e128-k8-t17-fp32-fine"),
                (PaddingIsLeftUnwritten, "padding is what the memory held", "align-written-unpicked"),
                (CountOfNothing, "no pairs, no count", "align-written-idle"),
                (LastRowOfNarrowLayer, "the last odd row is not written", "layer-written-one-token-bf16-shared-latent"),
            ),
        ),
        (
            "determinism-state",
            _BETWEEN,
            _ANY,
            (
                (WeightsCachedByShape, "weights are those of the first layer of the shape", "experts-after-others"),
                (StaysInTwoBytes, "a call in bfloat16 leaves the engine in it", "experts-after-others"),
                (WorkspaceOfTheLargestBatch, "a row of a larger batch shows", "experts-after-others"),
                (BiasOfTheFirstRouter, "the first router's bias is kept", "route-deepseek-v3-e96-k6-t9-fp32-fine"),
                (EveryOtherCallInDouble, "every other call takes another kernel", "experts-again-hot"),
            ),
        ),
        (
            "determinism-state",
            _SECOND,
            _ANY,
            (
                (SharedExpertOfTheFirstLayer, "the first layer's shared expert is kept", "layer-after-others-shared"),
                (EveryOtherLayerInDouble, "every other call takes another kernel", "layer-again-plain"),
            ),
        ),
        (
            "batch-invariance",
            _BATCH,
            frozenset(),
            (
                (SmallBatchesInFloat32, "up to 16 tokens take another kernel", "experts-rows-alone"),
                (RowsBehindTheLastTile, "rows beyond whole tiles take another kernel", "experts-rows-alone"),
                (OneTokenStoresEachExpert, "one token stores each expert", "experts-rows-alone-bf16"),
                (LayerOfFewTokens, "few tokens take another kernel", "layer-rows-alone-plain"),
                (SoftmaxOfOneRow, "one row takes another softmax", "route-renorm-e100-k6-t35-fp32-fine"),
            ),
        ),
    )
    for engine, fault, case in rows
)
