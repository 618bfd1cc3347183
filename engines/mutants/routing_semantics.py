"""Routers that choose or weigh by another rule than the model's, and routers that lose count on rows of no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "ids_and_weights_are_those_of_the_method"
SHIFT = "a_constant_added_to_all_logits_changes_nothing"
UNIQUE = "ids_are_unique_and_in_range_for_any_row"
AGAIN = "the_same_logits_give_the_same_bits_again"


class SoftmaxAfterTopK(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.method == "softmax_topk":
            weights = inputs.logits.float().gather(-1, ids).softmax(-1)
        return Routing(ids, weights)


class NeverRenormalises(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(replace(inputs, method="softmax_topk"))
        if inputs.per_expert_scale is not None:
            weights = weights * inputs.per_expert_scale[ids].float()
        return Routing(ids, weights)


class SelectsByScaledScore(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        if inputs.per_expert_scale is None:
            return super().route(inputs)
        scores = inputs.logits.float().softmax(-1) * inputs.per_expert_scale.float()
        ids = scores.topk(inputs.top_k).indices
        weights = scores.gather(-1, ids)
        return Routing(ids, weights / weights.sum(-1, keepdim=True))


class _Unscaled(Faulty):
    """Gemma 4 up to its last step, which a subclass gets wrong."""

    def route(self, inputs: RouteInputs) -> Routing:
        if inputs.per_expert_scale is None:
            return super().route(inputs)
        ids, weights = super().route(replace(inputs, method="softmax_topk_renorm"))
        return Routing(ids, weights * self.scale_of(ids, inputs.per_expert_scale.float()))

    def scale_of(self, ids: Tensor, scale: Tensor) -> Tensor | float:
        return 1.0


class ScaleDropped(_Unscaled):
    pass


class ScaleOfSortedIds(_Unscaled):
    def scale_of(self, ids: Tensor, scale: Tensor) -> Tensor:
        return scale[ids.sort(dim=-1).values]


class ScaleOfSlot(_Unscaled):
    def scale_of(self, ids: Tensor, scale: Tensor) -> Tensor:
        return scale[: ids.shape[1]]


class WeightsInAnotherOrder(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids.sort(dim=-1).values, weights)


class LastExpertMasked(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        logits = inputs.logits.clone()
        if inputs.top_k < logits.shape[1]:
            logits[:, -1] = float("-inf")
        return super().route(replace(inputs, logits=logits))


class ScoresInLogitsDtype(Faulty):
    """vLLM's torch routing of Gemma 4, where there is no Triton, has softmax in the dtype of the logits."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.per_expert_scale is None:
            return Routing(ids, weights)
        weights = inputs.logits.softmax(-1).gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * inputs.per_expert_scale[ids]
        return Routing(ids, weights.float())


class ExpWithoutMaximum(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        overflowing = inputs.logits.float().exp().isinf().any(-1, keepdim=True)
        return super().route(replace(inputs, logits=inputs.logits.masked_fill(overflowing, float("nan"))))


class RepeatsExpertOnNaN(Faulty):
    """vllm#39391: a NaN is never greater, so each of K searches for the maximum returns the first expert."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids.masked_fill(inputs.logits.isnan().any(-1, keepdim=True), 0), weights)


class RepeatsExpertOnMinusInfinity(Faulty):
    """What is chosen is masked with -inf, which is what the others of such a row hold already."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        others = (inputs.logits != float("-inf")).sum(-1, keepdim=True).clamp_min(1)
        slot = ids.new_ones(ids.shape).cumsum(-1) - 1
        return Routing(ids.where(slot < others, ids[:, :1]), weights)


class PaddingLaneWins(Faulty):
    """Rows are widened to a power of two, and the added lanes beat a NaN."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        experts = inputs.logits.shape[1]
        if experts & (experts - 1):
            ids[inputs.logits.isnan().all(-1), -1] = experts
        return Routing(ids, weights)


class TiesGoEitherWay(Faulty):
    """Two calls in four break ties to the highest id."""

    def __init__(self) -> None:
        self.calls = 0

    def route(self, inputs: RouteInputs) -> Routing:
        self.calls += 1
        if self.calls & 2:
            return super().route(inputs)
        scale, last = inputs.per_expert_scale, inputs.logits.shape[1] - 1
        flipped = replace(
            inputs, logits=inputs.logits.flip(-1), per_expert_scale=None if scale is None else scale.flip(0)
        )
        ids, weights = super().route(flipped)
        return Routing(last - ids, weights)


_GEMMA4 = "route-gemma4-e128-k8-t63-fp32-normal"
_PLAIN = "route-plain-e128-k8-t63-fp32-distinct"
_RENORM = "route-renorm-e60-k4-t63-bf16-distinct"


def _method(engine: type[Faulty], fault: str, case: str, check: str = METHOD) -> Mutant:
    return Mutant(engine, "routing-semantics", fault, (case, check))


def _unique(engine: type[Faulty], fault: str, case: str, check: str = UNIQUE) -> Mutant:
    return Mutant(engine, "ties-nan-duplicates", fault, (case, check))


MUTANTS = (
    _method(SoftmaxAfterTopK, "softmax runs over the chosen logits, not over all", _PLAIN),
    _method(NeverRenormalises, "the weights of the chosen experts are left as they are", _RENORM),
    _method(SelectsByScaledScore, "the per-expert scale enters the selection and the renormalisation", _GEMMA4),
    _method(ScaleDropped, "the per-expert scale is dropped", _GEMMA4),
    _method(ScaleOfSortedIds, "scales are gathered for the ids in sorted order", _GEMMA4),
    _method(ScaleOfSlot, "scales are indexed by slot and not by expert", _GEMMA4),
    _method(WeightsInAnotherOrder, "ids are sorted after the weights were taken", _PLAIN),
    _method(
        LastExpertMasked, "the tail mask takes the last expert with it", "route-plain-e60-k4-t7-bf16-distinct-sliced"
    ),
    _method(ScoresInLogitsDtype, "softmax runs in bfloat16", "route-gemma4-e128-k8-t63-bf16-normal-transposed"),
    _method(
        ExpWithoutMaximum,
        "exp runs without the maximum subtracted, and overflows",
        "route-renorm-e128-k8-t7-fp32-distinct",
        SHIFT,
    ),
    _unique(RepeatsExpertOnNaN, "a row with NaN names expert 0 K times", "route-plain-e128-k8-t23-bf16-not-numbers"),
    _unique(
        RepeatsExpertOnMinusInfinity,
        "a row of -inf names one expert K times",
        "route-renorm-e256-k8-t23-fp32-not-numbers",
    ),
    _unique(PaddingLaneWins, "a row of NaN names expert E", "route-plain-e60-k4-t23-fp32-not-numbers-sliced"),
    _unique(
        TiesGoEitherWay,
        "ties go to the lowest id on one call and to the highest on the next",
        "route-gemma4-e128-k8-t63-bf16-tied",
        AGAIN,
    ),
)
