"""Routers that choose or weigh by another rule than the model's, and routers that lose count on rows of no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing, RoutingSpec
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "ids_and_weights_are_those_of_the_method"
SHIFT = "a_constant_added_to_all_logits_changes_nothing"
UNIQUE = "ids_are_unique_and_in_range_for_any_row"
AGAIN = "the_same_logits_give_the_same_bits_again"
ROUTER = "a_router_chooses_and_weighs_by_its_method"
SHARED = "shared_experts_are_the_last_slots"
CHOSEN = "shared_experts_oust_no_chosen_one"
PADDING = "padding_rows_change_no_token"


def _but(inputs: RouteInputs, **fields: Any) -> RouteInputs:
    """The same inputs with other fields of the method."""
    return replace(inputs, routing=replace(inputs.routing, **fields))


def _scale(inputs: RouteInputs) -> Tensor:
    return inputs.tensors["router.per_expert_scale"].float()


class SoftmaxAfterTopK(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        if inputs.routing != RoutingSpec(inputs.routing.top_k):
            return super().route(inputs)
        return super().route(_but(inputs, select_on="logits"))


class NeverRenormalises(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        return super().route(_but(inputs, renormalize="no"))


class ModuleNeverRenormalises(Faulty):
    """The router's module has no such flag, its routing function has."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        return super().router_module(replace(spec, routing=replace(spec.routing, renormalize="no")))


class SelectsByScaledScore(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        if not inputs.routing.per_expert_scale:
            return super().route(inputs)
        scores = inputs.logits.float().softmax(-1) * _scale(inputs)
        ids = scores.topk(inputs.routing.top_k).indices
        weights = scores.gather(-1, ids)
        return Routing(ids, weights / weights.sum(-1, keepdim=True))


class _Unscaled(Faulty):
    """Gemma 4 up to its last step, which a subclass gets wrong."""

    def route(self, inputs: RouteInputs) -> Routing:
        if not inputs.routing.per_expert_scale:
            return super().route(inputs)
        ids, weights = super().route(_but(inputs, per_expert_scale=False))
        return Routing(ids, weights * self.scale_of(ids, _scale(inputs)))

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
        if inputs.routing.top_k < logits.shape[1] and not inputs.routing.shared_classes:
            logits[:, -1] = float("-inf")
        return super().route(replace(inputs, logits=logits))


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
        spec = inputs.routing
        is_plain = spec.selector == "topk" and spec.groups == 1 and not spec.classes(0) and not inputs.fused_shared
        if self.calls & 2 or not is_plain:
            return super().route(inputs)
        flipped = replace(
            inputs,
            logits=inputs.logits.flip(-1),
            tensors={name: tensor.flip(0) for name, tensor in inputs.tensors.items()},
        )
        ids, weights = super().route(flipped)
        return Routing(inputs.logits.shape[1] - 1 - ids, weights)


class BiasEntersWeights(Faulty):
    """transformers#39581, PaddleFormers#3452."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        is_biased = inputs.routing.selection_bias and inputs.routing.score == "sigmoid"
        if is_biased and not inputs.routing.shared_classes and inputs.fused_shared is None:
            scores = inputs.logits.float().sigmoid() + inputs.tensors["router.selection_bias"]
            weights = scores.gather(-1, ids.clamp(min=0))
            weights = weights / weights.sum(-1, keepdim=True) * inputs.routing.scale
        return Routing(ids, weights)


class BiasInScoresDtype(Faulty):
    """The selection bias is rounded to two bytes, as `.to(bfloat16)` of a whole model does."""

    def route(self, inputs: RouteInputs) -> Routing:
        rounded = {name: t.bfloat16().float() if "bias" in name else t for name, t in inputs.tensors.items()}
        return super().route(replace(inputs, tensors=rounded))


class GroupsByTheirBest(Faulty):
    """DeepSeek-V2's rule of groups for DeepSeek-V3's routers."""

    def route(self, inputs: RouteInputs) -> Routing:
        return super().route(_but(inputs, group_score="max"))


class OneGroupMore(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        spec = inputs.routing
        return super().route(_but(inputs, top_groups=min(spec.groups, spec.top_groups + 1)))


class EpsilonDropped(Faulty):
    """sglang#31017."""

    def route(self, inputs: RouteInputs) -> Routing:
        return super().route(_but(inputs, epsilon=0.0))


class ScaleOnlyWhenRenormalising(Faulty):
    """sglang-jax#1282."""

    def route(self, inputs: RouteInputs) -> Routing:
        return super().route(inputs if inputs.routing.renormalize == "sum" else _but(inputs, scale=1.0))


class FiveHundredAndTwelveLanes(Faulty):
    """A row's program has 512 lanes, and what lies beyond them is never chosen."""

    def route(self, inputs: RouteInputs) -> Routing:
        logits = inputs.logits.clone()
        logits[:, 512:] = float("-inf")
        return super().route(replace(inputs, logits=logits))


class SixteenRounds(Faulty):
    """The search for the next largest runs at most sixteen times; further slots keep what was chosen first."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        ids[:, 16:], weights[:, 16:] = ids[:, :1], weights[:, :1]
        return Routing(ids, weights)


class IdsInTenBits(Faulty):
    """Score and id are packed into one key, whose low nine bits hold the id."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids & 511, weights)


class TiedGroupsAllKept(Faulty):
    """Groups are kept whose score is at least that of the last one: with ties, more than there should be."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec = inputs.routing
        if spec.groups > 1 and spec.group_score == "top2_sum" and spec.score == "sigmoid" and len(inputs.logits):
            scores = inputs.logits.float().sigmoid() + inputs.tensors["router.selection_bias"]
            best = scores.unflatten(1, (spec.groups, -1)).topk(2, dim=-1).values.sum(-1)
            if bool((best == best[:, :1]).all()):
                return super().route(_but(inputs, groups=1, top_groups=1))
        return super().route(inputs)


class ThresholdTakesTiesFirst(Faulty):
    """Experts are taken in the order of their ids until K have the score of the K-th: ties oust larger scores."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        plain = inputs.routing == RoutingSpec(inputs.routing.top_k, renormalize="sum")
        if not plain or not len(ids) or inputs.fused_shared is not None or inputs.valid_rows is not None:
            return Routing(ids, weights)
        scores = inputs.logits.double().softmax(-1)
        candidates = scores >= scores.gather(-1, ids).amin(-1, keepdim=True)
        ids = candidates.long().sort(dim=-1, descending=True, stable=True).indices[:, : ids.shape[1]]
        weights = scores.gather(-1, ids)
        return Routing(ids, (weights / weights.sum(-1, keepdim=True)).float())


class BatchMaximumOfAllRows(Faulty):
    """exp is taken over the largest logit of the batch, padding rows included."""

    def route(self, inputs: RouteInputs) -> Routing:
        if inputs.valid_rows is None:
            return super().route(inputs)
        most = inputs.logits[inputs.logits.isfinite()].max()
        return super().route(replace(inputs, logits=(inputs.logits - most).bfloat16().to(inputs.logits.dtype)))


class LastRowTakenForPadding(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        rows = inputs.valid_rows
        return super().route(inputs if rows is None else replace(inputs, valid_rows=rows - 1))


class SharedSlotIsScaled(Faulty):
    """The scaling factor meets the shared expert's slot, too."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.fused_shared is not None and inputs.fused_shared.rule == "constant":
            weights[:, inputs.routing.top_k :] *= inputs.routing.scale
        return Routing(ids, weights)


class SharedSlotIsExpertZero(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        ids[:, inputs.routing.top_k :] = 0
        return Routing(ids, weights)


class SharedSlotOustsTheLastId(Faulty):
    """sglang#8125: one more expert is chosen, and the shared one takes the place of the last, not of the worst."""

    def route(self, inputs: RouteInputs) -> Routing:
        if inputs.fused_shared is None or inputs.routing.selection_bias:
            return super().route(inputs)
        more = replace(_but(inputs, top_k=inputs.routing.top_k + 1), fused_shared=None)
        last = super().route(more).ids.amax(1, keepdim=True)
        return super().route(replace(inputs, logits=inputs.logits.scatter(1, last, float("-inf"))))


class SearchBeginsAtZero(Faulty):
    """vllm#37605: the largest logit so far is 0 at first, so where all are negative none is larger."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec, negative = inputs.routing, (inputs.logits < 0).all(1, keepdim=True)
        if spec.select_on == "logits" and spec.selector == "topk" and inputs.fused_shared is None:
            inputs = replace(inputs, logits=inputs.logits.masked_fill(negative, 0.0))
        return super().route(inputs)


_GEMMA4 = "route-gemma4-e128-k8-t63-fp32-normal"
_PLAIN = "route-plain-e128-k8-t63-fp32-distinct"
_RENORM = "route-renorm-e60-k4-t63-bf16-distinct"


def _method(engine: type[Faulty], fault: str, case: str, check: str = METHOD, *also: str) -> Mutant:
    # Precision is judged by whole answers: what is chosen wrongly shows there, too.
    return Mutant(engine, "routing-semantics", fault, (case, check), frozenset({"router-precision", *also}))


def _unique(engine: type[Faulty], fault: str, case: str, check: str = UNIQUE, *also: str) -> Mutant:
    return Mutant(engine, "ties-nan-duplicates", fault, (case, check), frozenset(also))


MUTANTS = (
    _method(SoftmaxAfterTopK, "softmax runs over the chosen logits, not over all", _PLAIN),
    _method(NeverRenormalises, "the weights of the chosen experts are left as they are", _RENORM),
    _method(
        ModuleNeverRenormalises,
        "a module's weights are left as they are",
        "router-renorm-e128-k8-fp32",
        ROUTER,
        "closure-capture",
    ),
    _method(SelectsByScaledScore, "the per-expert scale enters the selection and the renormalisation", _GEMMA4),
    _method(ScaleDropped, "the per-expert scale is dropped", _GEMMA4),
    _method(ScaleOfSortedIds, "scales are gathered for the ids in sorted order", _GEMMA4),
    _method(ScaleOfSlot, "scales are indexed by slot and not by expert", _GEMMA4),
    _method(WeightsInAnotherOrder, "ids are sorted after the weights were taken", _PLAIN),
    _method(
        LastExpertMasked,
        "the tail mask takes the last expert with it",
        "route-plain-e60-k4-t7-bf16-distinct-sliced",
        METHOD,
        "chunking",
    ),
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
        "token-padding",
        "batch-invariance",
        "determinism-state",
    ),
    _method(BiasEntersWeights, "weights are gathered from the biased scores", "route-biased-e384-k8-t9-fp32-fine"),
    _method(BiasInScoresDtype, "the selection bias is rounded to bfloat16", "route-biased-e896-k16-t9-fp32-fine"),
    _method(GroupsByTheirBest, "a group counts as its best expert", "route-deepseek-v3-e256-k8-t9-fp32-fine"),
    _method(OneGroupMore, "one group too many competes", "route-deepseek-v3-e384-k8-t9-fp32-fine"),
    _method(EpsilonDropped, "nothing is added to the sum of scores", "route-deepseek-v3-e256-k8-t9-fp32-tiny"),
    _method(
        ScaleOnlyWhenRenormalising,
        "the scaling factor stands in the branch that renormalises",
        "route-deepseek-v2-e256-k8-t9-fp32-fine",
        METHOD,
        "shared-experts",
    ),
    _method(FiveHundredAndTwelveLanes, "experts beyond 512 are not looked at", "route-biased-e896-k16-t9-fp32-fine"),
    _method(
        SixteenRounds,
        "more than 16 experts a token repeat the first",
        "route-biased-e512-k22-t9-fp32-fine",
        METHOD,
        "unwritten-output",
    ),
    _method(IdsInTenBits, "ids wrap at 512", "route-renorm-e896-k16-t9-fp32-fine", METHOD, "shared-experts"),
    _method(SearchBeginsAtZero, "rows of negative logits are taken for ties", "route-chosen-e128-k8-t6-fp32-one-sign"),
    _method(TiedGroupsAllKept, "all tied groups compete", "route-deepseek-v3-e72-k6-t23-fp32-tied-groups"),
    _method(ThresholdTakesTiesFirst, "a tie ousts a larger score", "route-renorm-e40-k5-t23-fp32-last-place"),
    Mutant(
        BatchMaximumOfAllRows,
        "token-padding",
        "a padding row's logit is subtracted from every row in low precision",
        ("route-renorm-padding-rows", PADDING),
    ),
    Mutant(
        LastRowTakenForPadding,
        "token-padding",
        "the last token is taken for padding",
        ("route-biased-padding-rows", PADDING),
    ),
    Mutant(
        SharedSlotIsScaled,
        "shared-experts",
        "the scaling factor multiplies the shared expert's weight",
        ("route-deepseek-v3-fused-shared-one", SHARED),
    ),
    Mutant(
        SharedSlotIsExpertZero,
        "shared-experts",
        "the shared expert's slot names expert 0",
        ("route-renorm-fused-shared-one", SHARED),
    ),
    Mutant(
        SharedSlotOustsTheLastId,
        "shared-experts",
        "the shared expert takes the place of the highest id",
        ("route-renorm-fused-shared-one", CHOSEN),
    ),
)
