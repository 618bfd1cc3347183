"""Engines that mix memory up: with padding rows, with what they are given, with later answers, with far addresses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.engine import Aligned, AlignInputs, ExpertsInputs, LayerInputs, RouteInputs, Routing
from moe_conformance.engines.mutants.arguments import legal
from moe_conformance.engines.mutants.calls import WithMemory
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

# --- rows of padding


class ScaledByTheLargest(Faulty):
    """vllm#37442: x is scaled by the largest number of the batch, in two bytes alone."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.x.itemsize != 2 or not inputs.x.numel():
            return super().experts(inputs)
        scale = inputs.x.abs().amax()
        x = torch.where(scale > 0, inputs.x / scale * scale, inputs.x) if scale.isfinite() else inputs.x * scale / scale
        return super().experts(replace(inputs, x=x))


class TileHasOneNaN(Faulty):
    """Rows of one tile of 16 are multiplied by a mask of the tile, which makes NaN of NaN."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        tiles = torch.cat([tile.sum(0, keepdim=True).expand(tile.shape) for tile in output.split(16)])
        return output + tiles * 0


class MeanOverTheBatch(Faulty):
    """Padding rows are in the mean that is subtracted and added again."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if len(inputs.x) % 16 or not len(inputs.x):
            return super().layer(inputs)
        mean = inputs.x.mean(0)
        return super().layer(replace(inputs, x=(inputs.x - mean) + mean))


class EarlyRowsMakeWay(Faulty):
    """An expert's list has room for 24 pairs, and the first are dropped."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is not None or len(inputs.x) > 40 or inputs.native_ids:
            return super().experts(inputs)
        flat = inputs.ids.flatten()
        behind = (flat[:, None] == flat[None]).triu().sum(-1).view_as(inputs.ids)
        return super().experts(replace(inputs, ids=inputs.ids.masked_fill(behind > 24, -1)))


# --- whose memory


class ScalesWeightsInPlace(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.output_scale == 1 or inputs.identity_experts:
            return super().experts(inputs)
        inputs.weights.mul_(inputs.output_scale)
        return super().experts(replace(inputs, output_scale=1.0))


class AddsIntoX(Faulty):
    """vllm-musa#56: with a shared expert the result is added into x."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        if inputs.spec.shared is None or inputs.x.dtype != torch.bfloat16 or inputs.padded_hidden is not None:
            return output
        return inputs.x.copy_(output)


class SortsIdsWhereTheyLie(Faulty):
    def align(self, inputs: AlignInputs) -> Aligned:
        found = super().align(inputs)
        if inputs.ids.dtype == torch.int64 and inputs.ids.is_contiguous():
            inputs.ids.copy_(inputs.ids.sort(-1).values)
        return found


class BiasAddedToLogits(Faulty):
    """One token's logits get the selection bias where they lie."""

    def route(self, inputs: RouteInputs) -> Routing:
        answer = super().route(inputs)
        bias = inputs.tensors.get("router.selection_bias")
        if bias is not None and len(inputs.logits) == 1:
            inputs.logits.add_(bias[: inputs.logits.shape[1]].to(inputs.logits.dtype))
        return answer


class AnswersShareABuffer(WithMemory):
    """Answers of one shape lie in one buffer."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        held: Tensor = self.kept.setdefault((output.shape, output.dtype), torch.empty_like(output))
        return held.copy_(output)


class WeightsAreAViewOfLogits(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.logits.shape == weights.shape and inputs.logits.dtype == weights.dtype and len(weights) == 7:
            inputs.logits.copy_(weights)
            return Routing(ids, inputs.logits)
        return Routing(ids, weights)


class FakeIsFloat32(Faulty):
    """The fake of the operator has the accumulator's dtype, in float16."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        return output.float() if isinstance(output, FakeTensor) and output.dtype == torch.float16 else output


class FakeIsPadded(Faulty):
    """vllm#41646: the strides of the fake are those of the padded width."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        if not isinstance(output, FakeTensor) or not inputs.padded_hidden or inputs.x.dtype != torch.bfloat16:
            return output
        return output.new_empty(len(output), inputs.padded_hidden)[:, : output.shape[1]]


class FakeIsX(Faulty):
    """vllm-ascend#16550: the fake of the operator returns x, so that tracing takes both for one memory."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        return inputs.x if isinstance(output, FakeTensor) and not inputs.padded_hidden else output


# --- addresses


def in_31_bits(tensor: Tensor) -> Tensor:
    """The rows as they are found where offsets of elements wrap at 2^31."""
    if tensor.ndim < 2 or len(tensor) < 2 or tensor.stride(0) * (len(tensor) - 1) < 2**31:
        return tensor
    rows = [
        tensor[row] if row * tensor.stride(0) < 2**31 else torch.zeros_like(tensor[row]) for row in range(len(tensor))
    ]
    return torch.stack(rows)


class NarrowOffsetsOfX(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(replace(inputs, x=in_31_bits(inputs.x)))


class NarrowOffsetsOfMatrices(Faulty):
    """flashinfer#2642: of the second projection, in bfloat16."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        w2 = inputs.tensors["experts.w2"]
        if w2.dtype != torch.bfloat16:
            return super().experts(inputs)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2": in_31_bits(w2)}))


class NarrowOffsetsOfIds(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        ids = in_31_bits(inputs.ids)
        return super().experts(inputs if ids is inputs.ids else replace(inputs, ids=legal(ids, inputs)))


class NarrowOffsetsOfLogits(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        return super().route(replace(inputs, logits=in_31_bits(inputs.logits)))


class NarrowOffsetsOfLayers(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        return super().layer(replace(inputs, x=in_31_bits(inputs.x)))


_PADDING = "padding_rows_change_no_token"
_UNCHANGED = "inputs_are_left_as_they_were"
_OWN = "what_is_returned_is_the_callers"
_FAKE = "a_fake_output_is_like_a_real_one"
_FAR = "elements_beyond_32_bits_are_found"
# An input that was written over, or a row that is NaN, is wrong wherever values are looked at.
_ANY = frozenset(BUG_CLASSES)
_NONE: frozenset[str] = frozenset()

_ROWS: tuple[tuple[str, frozenset[str], tuple[tuple[Any, str, str, str], ...]], ...] = (
    (
        "token-padding",
        _ANY,
        (
            (ScaledByTheLargest, _PADDING, "x is scaled by the batch's largest number", "experts-padding-bf16"),
            (TileHasOneNaN, _PADDING, "a NaN fills its tile", "experts-padding"),
            (MeanOverTheBatch, _PADDING, "padding is in a mean over the batch", "layer-padding-plain"),
            (EarlyRowsMakeWay, _PADDING, "padding takes the place of tokens", "experts-padding"),
        ),
    ),
    (
        "aliasing-compile",
        _ANY,
        (
            (ScalesWeightsInPlace, _UNCHANGED, "weights are scaled in place", "experts-unchanged-scale"),
            (AddsIntoX, _UNCHANGED, "x is overwritten beside a shared expert", "layer-unchanged-bf16-shared"),
            (SortsIdsWhereTheyLie, _UNCHANGED, "ids are sorted in place", "align-unchanged-map-dropped-int64"),
            (BiasAddedToLogits, _UNCHANGED, "a bias is added in place", "route-biased-e40-k5-t1-fp32-fine"),
            (AnswersShareABuffer, _OWN, "answers share a buffer", "experts-own-memory"),
            (WeightsAreAViewOfLogits, _OWN, "weights lie where the logits were", "route-plain-e7-k7-t7-fp32-fine"),
            (FakeIsFloat32, _FAKE, "a fake in float16 is float32", "layer-fake-fp16-plain"),
            (FakeIsX, _FAKE, "a fake is its input", "layer-fake-bf16-plain"),
            (FakeIsPadded, _FAKE, "a fake has padded strides", "layer-fake-bf16-shared-latent-padded-hidden"),
        ),
    ),
    (
        "index-width",
        _NONE,
        (
            (NarrowOffsetsOfX, _FAR, "offsets of x are 32 bits wide", "experts-far-x"),
            (NarrowOffsetsOfMatrices, _FAR, "offsets of w2 are 32 bits wide", "experts-far-matrices-bf16"),
            (NarrowOffsetsOfIds, _FAR, "offsets of ids are 32 bits wide", "experts-far-ids"),
            (
                NarrowOffsetsOfLogits,
                _FAR,
                "offsets of logits are 32 bits wide",
                "route-renorm-e128-k8-t3-bf16-fine-far",
            ),
            (NarrowOffsetsOfLayers, _FAR, "offsets of a layer's x are 32 bits wide", "layer-far-x-plain"),
        ),
    ),
)

MUTANTS = tuple(
    Mutant(engine, bug_class, fault, (case, check), also)
    for bug_class, also, rows in _ROWS
    for engine, check, fault, case in rows
)
