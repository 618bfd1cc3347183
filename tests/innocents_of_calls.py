"""Engines that take or answer a call in another way than the reference, legitimately (see innocents.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from innocents import Accused, Innocent
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, LayerInputs, RouteInputs, Routing
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
        (MorePrecisely, "routing.precision", "route-chosen-e128-k8-t131-bf16-fine", _BITS, Verdict.PASS),
        (MorePrecisely, "routing.precision", "route-plain-e128-k8-t1-bf16-close", _BITS, Verdict.PASS),
        (NarrowWhereItMay, "routing.precision", "route-deepseek-v4-e128-k8-t131-bf16-fine", _BITS, Verdict.PASS),
    )
)
