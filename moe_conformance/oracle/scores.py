"""From logits to what top-k compares, with errors. Written independently of reference_impl."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import RoutingSpec
from moe_conformance.oracle.activation import INSIDE
from moe_conformance.oracle.precision import LAMBDA, in_precision, unit_roundoff, wide
from moe_conformance.oracle.value import Value

Tensors = Mapping[str, Tensor]

EXP = 4  # exp to 2 ulp, in units of u


def compared_value(logits: Tensor | Value, spec: RoutingSpec, tensors: Tensors, dtype: torch.dtype) -> Value:
    """What top-k compares, [T, E]: scores or logits, with the selection bias; groups are for `accepted`.

    logits: [T, classes], a Value where they have errors of their own; dtype: of the logits the engine scores. The
    limit is the error bound D of one score. Softmax scores without a bias are ordered like their logits, because they
    share the denominator. So the logits are returned, with the roundings of numerator and division. Probabilities below
    the smallest normal number may all be 0.
    """
    store = in_precision(dtype, spec.score_dtype)
    value = routed_logits(conditioned(logits, spec, store), spec)
    if spec.select_on == "scores":
        if spec.score == "softmax" and spec.groups == 1 and not spec.selection_bias:
            below = value.exact.amax(1, keepdim=True) - value.exact
            floor = value.exact.logsumexp(1, keepdim=True) + math.log(torch.finfo(store).tiny)
            return value.erring(below, 1, store).erring(1.0, EXP + 1, store).through(lambda v: v.maximum(floor))
        value = score(value, spec, store)
    if spec.selection_bias:
        value = (value + Value.of(tensors["router.selection_bias"])).stored(wide(store))
    return value


def conditioned(logits: Tensor | Value, spec: RoutingSpec, store: torch.dtype) -> Value:
    """Logits scaled and capped, [T, classes]; of product keys all sums of two halves, [T, E]."""
    value = logits if isinstance(logits, Value) else Value.of(logits)
    if spec.logit_scale != 1:
        value = (value * Value.of(spec.logit_scale).stored(store)).stored(store)
    cap = spec.logit_softcap
    if cap:
        argument = value.exact.abs() / 2  # as in activation.activated
        value = value.through(lambda v: cap * torch.tanh(v / cap)).erring(argument, 1, store).stored(store, INSIDE)
    if spec.selector == "product_keys":
        halves = value.map(lambda t: t.reshape(2, len(t), t.shape[1] // 2))
        value = (halves[0][:, :, None] + halves[1][:, None, :]).stored(store).map(lambda t: t.flatten(1))
    return value


def routed_logits(logits: Value, spec: RoutingSpec) -> Value:
    """The logits without those of weighted shared experts."""
    return logits[:, : logits.exact.shape[1] - spec.shared_classes]


def score(value: Value, spec: RoutingSpec, dtype: torch.dtype, shift: float = 0.0) -> Value:
    """The score of each logit of a row, computed in dtype; shift as `softmax`."""
    if spec.score == "softmax":
        return softmax(value, dtype, shift)
    if spec.score == "sqrt_softplus":
        return _root_of_softplus(value, dtype).stored(dtype, INSIDE)
    found, flushed = value.through(torch.sigmoid).stored(dtype, INSIDE), torch.finfo(wide(dtype)).tiny
    return Value(found.exact, found.spread + flushed, found.limit + flushed)  # exp overflows before it gets there


def _root_of_softplus(value: Value, dtype: torch.dtype) -> Value:
    """A softplus below the normal numbers of float32 may be 0; below those of dtype it is stored with absolute errors.

    The root makes such an error h of a softplus s larger: |sqrt(s + h) - sqrt(s)| <= h / sqrt(s), and <= sqrt(h).
    """
    found, tiny = value.through(lambda v: F.softplus(v).sqrt()), torch.finfo(wide(dtype)).tiny
    lowest = found.exact - found.limit
    flushed = (lowest < math.sqrt(2 * tiny)).double() * tiny
    lost = flushed + 2 * unit_roundoff(dtype) * torch.finfo(dtype).tiny  # exp and softplus
    error = lost / lowest.maximum(lost.sqrt())
    return Value(found.exact, found.spread + error, found.limit + error)


def softmax(value: Value, dtype: torch.dtype, shift: float = 0.0) -> Value:
    """Over the last dim, stored in dtype, its sum accumulated in float32 or wider. What underflows may be 0.

    A weight p_i = exp(l_i) / sum exp(l_j) has the relative error (1 - p_i) d_i - sum over j != i of p_j d_j, d the
    error of a logit, its difference to the largest rounded, and of exp (2 ulp); then E additions, the sum stored, and
    a division. exp(l - logsumexp) rounds a number of the size of the logits once, an error that all weights share.
    shift: what was added to all logits, which changes nothing but that number.
    """
    u, narrow, p = unit_roundoff(wide(dtype)), unit_roundoff(dtype), value.exact.softmax(1)
    below = value.exact.amax(1, keepdim=True) - value.exact
    each = value.erring(below, 1, dtype).erring(1.0, EXP, dtype)
    terms, common = p.shape[1], narrow * (value.exact.logsumexp(1, keepdim=True).abs() + abs(shift))

    def relative(of_all: Tensor, own: Tensor) -> Tensor:
        return (of_all.sum(1, keepdim=True) - of_all).clamp(min=0) + own

    squares = relative((p * each.spread).square(), ((1 - p) * each.spread).square())
    squares = squares + terms * u**2 + 2 * narrow**2 + common**2
    sums = relative(p * each.limit, (1 - p) * each.limit) + terms * u + 2 * narrow + common
    tiny = torch.finfo(dtype).tiny
    spread = p * torch.expm1(LAMBDA * squares.sqrt()) / LAMBDA
    return Value(p, spread + tiny, p * torch.expm1(sums) + tiny)
