"""Engines that take or answer a call in another way than the reference, legitimately (see innocents.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from innocents import Accused, Innocent
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, LayerInputs, RouteInputs, Routing
from moe_conformance.engines.mutants.calls import InvariantInDouble
from moe_conformance.errors import InputError
from moe_conformance.judging.verdict import Verdict


class CopiesFirst(Innocent):
    """Everything is made contiguous, and ids become int32."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        tensors = {name: tensor.contiguous() for name, tensor in inputs.tensors.items()}
        ids = inputs.ids if inputs.native_ids else inputs.ids.int()
        return super().experts(replace(inputs, x=inputs.x.contiguous(), tensors=tensors, ids=ids.contiguous()))

    def layer(self, inputs: LayerInputs) -> Tensor:
        return super().layer(replace(inputs, x=inputs.x.contiguous(), logits=inputs.logits.contiguous()))


class WantsContiguous(Innocent):
    """As many kernels do, it checks what it cannot read, in words of its own."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        assert inputs.x.is_contiguous(), "Hidden_states must be contiguous"
        assert inputs.ids.stride(-1) == 1 or inputs.ids.numel() == 0
        if inputs.weights.dtype != torch.float32 or inputs.ids.dtype != torch.int64:
            raise TypeError(f"got {inputs.ids.dtype} and {inputs.weights.dtype}, want int64 and float32")
        return super().experts(inputs)

    def route(self, inputs: RouteInputs) -> Routing:
        if not inputs.logits.is_contiguous() and inputs.logits.storage_offset():
            raise InputError("logits: got strides, want none")
        return super().route(inputs)


class MorePrecisely(Innocent):
    """Everything is float64 inside, also what a model computes in the dtype of its logits."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec = replace(inputs.routing, score_dtype="float32")
        ids, weights = super().route(replace(inputs, logits=inputs.logits.double(), routing=spec))
        return Routing(ids, weights.float())


class NarrowWhereItMay(Innocent):
    """Weights of a method that scores in the logits' dtype are handed on in that dtype."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.routing.score_dtype != "input" or inputs.routing.per_expert_scale:
            return Routing(ids, weights)
        return Routing(ids, weights.to(inputs.logits.dtype))


class OutputsInWiderRows(Innocent):
    """A kernel writes rows of padded width, and the answer is a view of them; what is behind is never written."""

    def wider(self, output: Tensor) -> Tensor:
        rows, width = output.shape
        return output.new_empty(rows, width + 12)[:, :width].copy_(output)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return self.wider(super().experts(inputs))

    def layer(self, inputs: LayerInputs) -> Tensor:
        return self.wider(super().layer(inputs))


class PreparesOnce(Innocent):
    """Weights are prepared once for each tensor, which it keeps alive, and again once they have changed."""

    def __init__(self) -> None:
        self.prepared: dict[str, tuple[Tensor, int, Tensor]] = {}

    def prepare(self, name: str, tensor: Tensor) -> Tensor:
        held = self.prepared.get(name)
        if held is None or held[0] is not tensor or held[1] != tensor._version:
            held = self.prepared[name] = (tensor, tensor._version, tensor.clone())
        return held[2]

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        tensors = {name: self.prepare(name, tensor) for name, tensor in inputs.tensors.items()}
        return super().experts(replace(inputs, tensors=tensors))


class InDouble(InvariantInDouble):
    """Bits do not depend on the batch, and are not those of float32 sums."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return self.in_double(inputs)


class StoresTransposed(Innocent):
    """Matrices lie transposed in its memory, whatever their shape."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        tensors = {name: t.mT.contiguous().mT if t.ndim > 2 else t for name, t in inputs.tensors.items()}
        return super().experts(replace(inputs, tensors=tensors))

    def layer(self, inputs: LayerInputs) -> Tensor:
        tensors = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in inputs.tensors.items()}
        return super().layer(replace(inputs, tensors=tensors))


class InChunks(Innocent):
    """No more than 50 tokens at a time."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if len(inputs.x) <= 50 or inputs.lora is not None:
            return super().experts(inputs)
        rows = zip(inputs.x.split(50), inputs.ids.split(50), inputs.weights.split(50), strict=True)
        parts = [super(InChunks, self).experts(replace(inputs, x=x, ids=ids, weights=w)) for x, ids, w in rows]
        return torch.cat(parts)


class PaddingIsZero(Innocent):
    """Rows that are not finite are padding to it: it answers 0 for them, and computes nothing."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        rows = inputs.x.isfinite().all(-1, keepdim=True)
        if bool(rows.all()):
            return super().experts(inputs)
        output = super().experts(replace(inputs, x=inputs.x.where(rows, 0)))
        return output.where(rows, 0)


class ScratchInX(Innocent):
    """It works in a copy of x, and hands that out."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        scratch = inputs.x.clone()
        return scratch.copy_(super().experts(inputs))


class TwoViewsOfOneBuffer(Innocent):
    """Ids and weights are parts of one buffer, apart from each other."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if weights.dtype != torch.float32:
            return Routing(ids, weights)
        room = torch.empty(2, *ids.shape, dtype=torch.int32)
        room[0] = ids
        return Routing(room[0], room[1].view(torch.float32).copy_(weights))


_PADDING = "padding_rows_change_no_token"
_UNCHANGED = "inputs_are_left_as_they_were"
_OWN = "what_is_returned_is_the_callers"
_FAR = "elements_beyond_32_bits_are_found"
_LAYOUT = "no_shape_decides_a_layout"
_MANY = "any_number_of_tokens_is_computed"
_WRITTEN = "every_element_is_written"
_BETWEEN = "another_call_between_leaves_no_trace"
_BATCH = "rows_keep_their_bits_in_any_batch"
_BITS = "scores_keep_their_bits"
_GIVEN = "arguments_are_read_as_given"

ACCUSED = tuple(
    Accused(engine, clause, (case, check), verdict)
    for engine, clause, case, check, verdict in (
        (CopiesFirst, "inputs.strides", "experts-x-transposed", _GIVEN, Verdict.PASS),
        (CopiesFirst, "inputs.dtypes", "experts-ids-int32-bf16", _GIVEN, Verdict.PASS),
        (WantsContiguous, "inputs.strides", "experts-x-columns", _GIVEN, Verdict.UNSUPPORTED),
        (WantsContiguous, "inputs.strides", "experts-x-sliced", _GIVEN, Verdict.UNSUPPORTED),
        (WantsContiguous, "inputs.dtypes", "experts-weights-bf16", _GIVEN, Verdict.UNSUPPORTED),
        (PaddingIsZero, "rows.padding", "experts-padding", _PADDING, Verdict.PASS),
        (ScratchInX, "calls.inputs-unchanged", "experts-unchanged-scale", _UNCHANGED, Verdict.PASS),
        (ScratchInX, "outputs.own-memory", "experts-own-memory", _OWN, Verdict.PASS),
        (TwoViewsOfOneBuffer, "outputs.own-memory", "route-renorm-e44-k4-t7-fp32-fine", _OWN, Verdict.PASS),
        (CopiesFirst, "inputs.beyond-int32", "experts-far-x", _FAR, Verdict.PASS),
        (WantsContiguous, "inputs.beyond-int32", "experts-far-x", _FAR, Verdict.UNSUPPORTED),
        (StoresTransposed, "matrices.orientation", "experts-all-are-one-silu-bf16", _LAYOUT, Verdict.PASS),
        (StoresTransposed, "matrices.orientation", "layer-oriented-all-are-one-shared-latent", _LAYOUT, Verdict.PASS),
        (InChunks, "batches.any-size", "experts-hot", _MANY, Verdict.PASS),
        (InChunks, "batches.any-size", "experts-257-tokens", _MANY, Verdict.PASS),
        (OutputsInWiderRows, "outputs.written", "experts-written-wide-tail", _WRITTEN, Verdict.PASS),
        (OutputsInWiderRows, "outputs.written", "layer-written-one-token-plain", _WRITTEN, Verdict.PASS),
        (PreparesOnce, "calls.same-result", "experts-after-others", _BETWEEN, Verdict.PASS),
        (PreparesOnce, "calls.same-bits", "experts-again", _BETWEEN, Verdict.PASS),
        (InDouble, "rows.batch-invariant", "experts-rows-alone", _BATCH, Verdict.PASS),
        (CopiesFirst, "rows.batch-invariant", "experts-rows-alone", _BATCH, Verdict.UNSUPPORTED),
        (MorePrecisely, "routing.precision", "route-chosen-e128-k8-t131-bf16-fine", _BITS, Verdict.PASS),
        (MorePrecisely, "routing.precision", "route-plain-e128-k8-t1-bf16-close", _BITS, Verdict.PASS),
        (NarrowWhereItMay, "routing.precision", "route-deepseek-v4-e128-k8-t131-bf16-fine", _BITS, Verdict.PASS),
    )
)
