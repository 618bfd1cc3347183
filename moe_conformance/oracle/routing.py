"""Which experts a correct router may choose and how far its weights may be off, for a router's input of any precision.

As layer_bound.py: float64 `Value`s, written apart from reference_impl. Ids are compared by score, not for equality: a
set is right where no score left out exceeds one chosen by more than the errors of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import LogitsSpec, Precision, RoutingSpec
from moe_conformance.oracle.layer import ACTIVATIONS, INSIDE
from moe_conformance.oracle.tolerance import LAMBDA, Value, unit_roundoff, wide

Tensors = Mapping[str, Tensor]

EXP = 4  # exp to 2 ulp, in units of u


def in_precision(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype that a Precision means for an input of this dtype."""
    return wide(dtype) if precision == "float32" else dtype


def logits_value(x: Tensor, spec: LogitsSpec, tensors: Tensors, state: Tensor | None = None) -> Value:
    """Router logits [T, classes] of x [T, H] with the spread of a router that computes as spec says, in x's dtype.

    state: [T, R], the state of the previous MoE layer, for "zaya".
    """
    store = in_precision(x.dtype, spec.dtype)
    compute, value = wide(store), Value.of(x)

    def linear(at: Value, weight: str, bias: str) -> Value:
        product = at.project(tensors[weight], compute).stored(store)
        return (product + Value.of(tensors[bias])).stored(store) if bias in tensors else product

    if spec.kind == "gemma4":
        value = value.rms_norm(tensors["router.scale"], spec.norm_eps, compute, store)
        value = (value * Value.of(x.shape[1] ** -0.5).stored(store)).stored(store)
    elif spec.kind == "zaya":
        value = linear(value, "router.down.weight", "router.down.bias")
        if spec.takes_state and state is not None:
            before = (Value.of(state) * Value.of(tensors["router.state_scale"])).stored(store)
            value = (value + before).stored(store)
        value = value.rms_norm(tensors["router.norm"], spec.norm_eps, compute, store)
        for layer in ("fc1", "fc2"):
            value = linear(value, f"router.{layer}.weight", f"router.{layer}.bias")
            value = value.through(ACTIVATIONS["gelu"]).erring(value.exact.abs() / 2, INSIDE, compute).stored(store)
    return linear(value, "router.proj", "router.bias")


def compared_value(logits: Tensor | Value, spec: RoutingSpec, tensors: Tensors, dtype: torch.dtype) -> Value:
    """What top-k compares, [T, E]: scores or logits, with the selection bias; groups are for `accepted`.

    logits: [T, classes], a Value where they have errors of their own; dtype: of the logits the engine scores. The
    limit is the error bound D of one score. Softmax scores compared by themselves are in the order of their logits,
    for the denominator is common: those are returned, with the roundings of numerator and division. Probabilities
    below the smallest normal number may all be 0.
    """
    store = in_precision(dtype, spec.score_dtype)
    value = _routed_logits(_conditioned(logits, spec, store), spec)
    if spec.select_on == "scores":
        if spec.score == "softmax" and spec.groups == 1 and not spec.selection_bias:
            below = value.exact.amax(-1, keepdim=True) - value.exact
            floor = value.exact.logsumexp(-1, keepdim=True) + math.log(torch.finfo(store).tiny)
            return value.erring(below, 1, store).erring(1.0, EXP + 1, store).through(lambda v: v.maximum(floor))
        value = _score(value, spec, store)
    if spec.selection_bias:
        value = (value + Value.of(tensors["router.selection_bias"])).stored(wide(store))
    return value


def accepted(ids: Tensor, compared: Value, spec: RoutingSpec) -> Tensor:
    """[T] bool: whether ids [T, K] are the best K, among the best groups, for some scores within their errors."""
    exact, error = compared.exact, compared.limit
    tokens, experts = exact.shape
    members = (tokens, spec.groups, experts // spec.groups)
    size = 2 if spec.group_score == "top2_sum" else 1
    best = exact.reshape(members).topk(min(size, members[2])).values.sum(-1)  # [T, G]
    best_error = size * error.reshape(members).amax(-1)
    picked = torch.zeros_like(exact, dtype=torch.bool).scatter(1, ids.long(), True)
    found = torch.zeros(tokens, dtype=torch.bool)
    for groups in combinations(range(spec.groups), spec.top_groups):
        chosen = torch.zeros(spec.groups, dtype=torch.bool)
        chosen[list(groups)] = True
        inside = chosen.repeat_interleave(members[2])
        among = exact.masked_fill(~inside, spec.group_mask), error.masked_fill(~inside, 0.0)
        found |= _best(chosen.expand_as(best), best, best_error) & _best(picked, *among)
    return found


def _best(picked: Tensor, scores: Tensor, error: Tensor) -> Tensor:
    """Whether the picked scores may be the largest of their row: min of score + error, over max of score - error."""
    worst = (scores + error).masked_fill(~picked, torch.inf).amin(-1)
    return worst >= (scores - error).masked_fill(picked, -torch.inf).amax(-1)


def weights_value(
    logits: Tensor | Value,
    ids: Tensor,
    spec: RoutingSpec,
    tensors: Tensors,
    dtype: torch.dtype,
    dropped: Tensor | None = None,
) -> tuple[Value, Value | None]:
    """Weights [T, K] of the experts ids [T, K] that an engine chose, and [T, n] of weighted shared experts.

    logits, dtype: as `compared_value`. dropped: [T, K] bool, pairs beyond an expert's capacity, or skipped: weight 0.
    The weights may be handed on in `dtype`.
    """
    store = in_precision(dtype, spec.score_dtype)
    conditioned = _conditioned(logits, spec, store)
    value, ids = _routed_logits(conditioned, spec), ids.long()
    if spec.selector == "sparsemixer":
        weights = _sparsemixer(value, ids, spec.jitter, store)
    elif spec.shared_classes:
        both = Value.cat([value.gather(ids), conditioned[:, -spec.shared_classes :]])
        weights = softmax(both.through(F.logsigmoid).stored(store, INSIDE), store)
    elif spec.select_on == "logits":
        weights = _score(value.gather(ids), spec, store)
    else:
        weights = _score(value, spec, store).gather(ids)
    kept = torch.ones_like(weights.exact) if dropped is None else (~dropped).double()
    late = spec.capacity is not None and spec.capacity.renormalize_before
    weights = _normalised(weights if late else weights * Value.of(kept), spec, store) * Value.of(kept)
    weights = (weights * Value.of(spec.scale).stored(store)).stored(store)
    if spec.global_scale:
        weights = (weights * Value.of(tensors["router.global_scale"])).stored(store)
    if spec.per_expert_scale:
        routed = (weights[:, : ids.shape[1]] * Value.of(tensors["router.per_expert_scale"][ids])).stored(store)
        weights = Value.cat([routed, weights[:, ids.shape[1] :]])
    weights = weights.stored(dtype)
    return weights[:, : ids.shape[1]], weights[:, ids.shape[1] :] if spec.shared_classes else None


def _conditioned(logits: Tensor | Value, spec: RoutingSpec, store: torch.dtype) -> Value:
    value = logits if isinstance(logits, Value) else Value.of(logits)
    if spec.logit_scale != 1:
        value = (value * Value.of(spec.logit_scale).stored(store)).stored(store)
    cap = spec.logit_softcap
    if cap:
        argument = value.exact.abs() / 2  # as in layer_bound.activated
        value = value.through(lambda v: cap * torch.tanh(v / cap)).erring(argument, 1, store).stored(store, INSIDE)
    if spec.selector == "product_keys":
        halves = value.map(lambda t: t.reshape(2, len(t), -1))
        value = (halves[0][:, :, None] + halves[1][:, None, :]).stored(store).map(lambda t: t.flatten(1))
    return value


def _routed_logits(conditioned: Value, spec: RoutingSpec) -> Value:
    return conditioned[:, : conditioned.exact.shape[1] - spec.shared_classes]


def _score(value: Value, spec: RoutingSpec, dtype: torch.dtype) -> Value:
    if spec.score == "softmax":
        return softmax(value, dtype)
    curve = torch.sigmoid if spec.score == "sigmoid" else lambda v: F.softplus(v).sqrt()
    return value.through(curve).stored(dtype, INSIDE)


def softmax(value: Value, dtype: torch.dtype) -> Value:
    """Over the last dim. What underflows may be 0.

    A weight p_i = exp(l_i) / sum exp(l_j) has the relative error (1 - p_i) d_i - sum over j != i of p_j d_j, d the
    error of a logit, its difference to the largest rounded, and of exp (2 ulp); then E additions and a division.
    """
    u, p = unit_roundoff(dtype), value.exact.softmax(-1)
    below = value.exact.amax(-1, keepdim=True) - value.exact
    each = value.erring(below, 1, dtype).erring(1.0, EXP, dtype)
    few = p.shape[-1] + 1

    def relative(of_all: Tensor, own: Tensor) -> Tensor:
        return (of_all.sum(-1, keepdim=True) - of_all).clamp(min=0) + own

    squares = relative((p * each.spread).square(), ((1 - p) * each.spread).square())
    sums = relative(p * each.limit, (1 - p) * each.limit)
    tiny = torch.finfo(dtype).tiny
    spread = p * torch.expm1(LAMBDA * (squares + few * u * u).sqrt()) / LAMBDA
    return Value(p, spread + tiny, p * torch.expm1(sums + few * u) + tiny)


def _sparsemixer(value: Value, ids: Tensor, jitter: float, dtype: torch.dtype) -> Value:
    """Each chosen logit m against the logits l not chosen before it for which (m - l) / max(|l|, m) <= 2 jitter.

    A logit so near to that limit that errors decide is once in and once out; the difference is one more error.
    """
    weights = []
    left = value
    for chosen in ids.split(1, dim=-1):
        best = left.gather(chosen)
        scale = left.exact.abs().maximum(best.exact)
        distance = ((best.exact - left.exact) / scale - 2 * jitter).scatter(-1, chosen, -torch.inf)
        error = (best.limit + left.limit) / scale + 2 * unit_roundoff(dtype)  # a difference and a quotient
        outcomes = [
            softmax(_without(left, far), dtype).gather(chosen)
            for far in (distance > error, distance > -error, distance > 0)
        ]
        most, least, exact = outcomes
        between = least.exact - most.exact
        weights.append(Value(exact.exact, least.spread + between / LAMBDA, least.limit + between))
        left = _without(left, torch.zeros_like(distance, dtype=torch.bool).scatter(-1, chosen, True))
    return Value.cat(weights)


def _without(logits: Value, out: Tensor) -> Value:
    """With no share in a softmax where out is set."""
    return Value(logits.exact.masked_fill(out, -1e4), *(t.masked_fill(out, 0) for t in (logits.spread, logits.limit)))


def _normalised(weights: Value, spec: RoutingSpec, dtype: torch.dtype) -> Value:
    terms = weights.exact.shape[-1]
    if spec.renormalize == "sum":
        total = weights.exact.sum(-1, keepdim=True)
        spread = weights.spread.square().sum(-1, keepdim=True).sqrt()
        divisor = (Value(total, spread) + Value.of(spec.epsilon)).erring(total, terms, dtype)
        return weights.over(divisor.through(lambda v: v.clamp(min=spec.floor)), dtype)
    if spec.renormalize == "norm":
        norm = weights.exact.norm(p=spec.norm_order, dim=-1, keepdim=True)
        slope = (weights.exact / norm) ** (spec.norm_order - 1)
        spread = (slope * weights.spread).square().sum(-1, keepdim=True).sqrt()
        return weights.over(Value(norm, spread).erring(norm, terms + INSIDE, dtype), dtype)
    return weights
