"""The weights of the experts that an engine chose, with errors. Written apart from reference_impl."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import RoutingSpec
from moe_conformance.oracle.activation import INSIDE
from moe_conformance.oracle.precision import LAMBDA, in_precision, unit_roundoff
from moe_conformance.oracle.scores import Tensors, conditioned, routed_logits, score, softmax
from moe_conformance.oracle.value import Value


def weights_value(
    logits: Tensor | Value,
    ids: Tensor,
    spec: RoutingSpec,
    tensors: Tensors,
    dtype: torch.dtype,
    dropped: Tensor | None = None,
    *,
    shift: float = 0.0,
    stored: torch.dtype | None = None,
) -> tuple[Value, Value | None]:
    """Weights [T, K] of the experts ids [T, K] that an engine chose, and [T, n] of weighted shared experts.

    logits, dtype: as `compared_value`. dropped: [T, K] bool, pairs beyond an expert's capacity, or skipped: weight 0.
    shift: what the engine had added to all logits of a softmax. stored: what the weights are handed on in, None for
    `dtype`.
    """
    store = in_precision(dtype, spec.score_dtype)
    whole = conditioned(logits, spec, store)
    value, ids = routed_logits(whole, spec), ids.long()
    if spec.selector == "sparsemixer":
        weights = _sparsemixer(value, ids, spec.jitter, store)
    elif spec.shared_classes:
        both = Value.cat([value.gather(ids), whole[:, -spec.shared_classes :]])
        weights = softmax(both.through(F.logsigmoid).stored(store, INSIDE), store, shift)
    elif spec.select_on == "logits":
        weights = score(value.gather(ids), spec, store, shift)
    else:
        weights = score(value, spec, store, shift).gather(ids)
    kept = torch.ones_like(weights.exact)
    if dropped is not None:
        kept[:, : ids.shape[1]] = (~dropped).double()
    # What a token skips counts in the sum, as does what it drops where that comes after it.
    late = spec.skip_expert or (spec.capacity is not None and spec.capacity.renormalize_before)
    weights = _normalised(weights if late else weights * Value.of(kept), spec, store) * Value.of(kept)
    weights = (weights * Value.of(spec.scale).stored(store)).stored(store)
    if spec.global_scale:
        weights = (weights * Value.of(tensors["router.global_scale"])).stored(store)
    if spec.per_expert_scale:
        routed = (weights[:, : ids.shape[1]] * Value.of(tensors["router.per_expert_scale"][ids])).stored(store)
        weights = Value.cat([routed, weights[:, ids.shape[1] :]])
    weights = weights.stored(stored or dtype)
    return weights[:, : ids.shape[1]], weights[:, ids.shape[1] :] if spec.shared_classes else None


def _sparsemixer(value: Value, ids: Tensor, jitter: float, dtype: torch.dtype) -> Value:
    """Each chosen logit m against the logits l not chosen before it for which (m - l) / max(|l|, m) <= 2 jitter.

    A logit so near to that limit that errors decide is once in and once out; the difference is one more error.
    """
    weights = []
    left = value
    for chosen in ids.split(1, dim=1):
        best = left.gather(chosen)
        scale = left.exact.abs().maximum(best.exact)
        distance = ((best.exact - left.exact) / scale - 2 * jitter).scatter(1, chosen, -torch.inf)
        error = (best.limit + left.limit) / scale + 2 * unit_roundoff(dtype)  # a difference and a quotient
        outcomes = [
            softmax(_without(left, far), dtype).gather(chosen)
            for far in (distance > error, distance > -error, distance > 0)
        ]
        most, least, exact = outcomes
        between = least.exact - most.exact
        weights.append(Value(exact.exact, least.spread + between / LAMBDA, least.limit + between))
        left = _without(left, torch.zeros_like(distance, dtype=torch.bool).scatter(1, chosen, True))
    return Value.cat(weights)


def _without(logits: Value, out: Tensor) -> Value:
    """With no share in a softmax where out is set: so far below all others that their exp is 0 in float64."""
    below = logits.exact.amin(1, keepdim=True) - 1e4
    return Value(below.where(out, logits.exact), *(t.masked_fill(out, 0) for t in (logits.spread, logits.limit)))


def _normalised(weights: Value, spec: RoutingSpec, dtype: torch.dtype) -> Value:
    terms = weights.exact.shape[1]
    if spec.renormalize == "sum":
        total = weights.exact.sum(1, keepdim=True)
        spread = weights.spread.square().sum(1, keepdim=True).sqrt()
        divisor = (Value(total, spread) + Value.of(spec.epsilon)).erring(total, terms, dtype)
        return weights.over(divisor.through(lambda v: v.clamp(min=spec.floor)), dtype)
    if spec.renormalize == "norm":
        norm = weights.exact.norm(p=spec.norm_order, dim=1, keepdim=True)
        slope = (weights.exact / norm) ** (spec.norm_order - 1)
        spread = (slope * weights.spread).square().sum(1, keepdim=True).sqrt()
        return weights.over(Value(norm, spread).erring(norm, terms + INSIDE, dtype), dtype)
    return weights
