"""Which experts a correct router may choose. Ids are judged by their scores, not compared for equality.

A set of experts is right if no score left out exceeds a chosen one by more than the errors of both. Written
independently of reference_impl.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_conformance.errors import Undecided
from moe_conformance.model.specs import RoutingSpec
from moe_conformance.oracle.capacity import Interval, Room, choices, room
from moe_conformance.oracle.precision import in_precision, unit_roundoff
from moe_conformance.oracle.scores import compared_value, conditioned, routed_logits, score
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value
from moe_conformance.protocol.routing import RouteInputs, Routing


class Choice(NamedTuple):
    """ids: [T, K] int64, -1 for a pair without an expert. weights: [T, K]. shared: [T, n], of the shared experts."""

    ids: Tensor
    weights: Value
    shared: Value | None


def interval(value: Value) -> Interval:
    return Interval(value.exact - value.limit, value.exact + value.limit)


def accepted(ids: Tensor, compared: Value, spec: RoutingSpec) -> Tensor:
    """[T] bool: whether ids [T, K] are the best K, among the best groups, for some scores within their errors.

    Errors may also leave open which groups are kept. So two thresholds are fixed: w, which no expert left out exceeds
    and no chosen one is below, and t, which no dropped group exceeds and no kept one is below. With both fixed, each
    group may be kept, dropped or either, independently of the others. w is tried at the best expert left out of every
    group, kept or dropped; t at every group's score.
    """
    low, high = interval(compared)
    members = (len(ids), spec.groups, low.shape[1] // spec.groups)  # T, G, E / G
    picked = torch.zeros_like(low, dtype=torch.bool).scatter(1, ids.long(), True).reshape(members)
    mask = torch.full(members[:2], spec.group_mask, dtype=torch.float64)
    # [2, T, G]: the worst chosen and the best left of each group, where it is kept and where it is dropped.
    chosen = torch.stack(
        [
            high.reshape(members).masked_fill(~picked, torch.inf).amin(2),
            mask.masked_fill(~picked.any(2), torch.inf),
        ]
    )
    left = torch.stack(
        [
            low.reshape(members).masked_fill(picked, -torch.inf).amax(2),
            mask.masked_fill(picked.all(2), -torch.inf),
        ]
    )
    best = group_scores(compared, spec)
    levels = torch.cat([best.low, torch.full_like(mask[:, :1], -torch.inf)], dim=1)[:, :, None]  # [T, G + 1, 1]
    may_stay, may_go = best.high[:, None] >= levels, best.low[:, None] <= levels  # [T, G + 1, G]
    found = torch.zeros(len(ids), dtype=torch.bool)
    for level in left.transpose(0, 1).flatten(1).split(1, dim=1):  # [T, 1]
        kept, dropped = ((left <= level) & (chosen >= level))[:, :, None]
        kept, dropped = kept & may_stay, dropped & may_go
        fits = (kept | dropped).all(2) & ((~dropped).sum(2) <= spec.top_groups) & (kept.sum(2) >= spec.top_groups)
        found |= fits.any(1)
    return found


def group_scores(compared: Value, spec: RoutingSpec) -> Interval:
    """What each group's score may be, [T, G]; the sum of two is rounded once more."""
    members = (len(compared.exact), spec.groups, compared.exact.shape[1] // spec.groups)
    many = min(2 if spec.group_score == "top2_sum" else 1, members[2])
    low, high = (bound.reshape(members).topk(many).values.sum(2) for bound in interval(compared))
    rounding = (many - 1) * unit_roundoff(torch.float32)
    return Interval(low - rounding * low.abs(), high + rounding * high.abs())


def best(compared: Value, spec: RoutingSpec) -> tuple[Tensor, Tensor]:
    """ids [T, K] of the best K of the exact scores, best first; and whether no rounding changes that set, [T]."""
    tokens, experts = compared.exact.shape
    many = min(2 if spec.group_score == "top2_sum" else 1, experts // spec.groups)
    groups = compared.exact.reshape(tokens, spec.groups, experts // spec.groups).topk(many).values.sum(2)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.topk(spec.top_groups).indices, True)
    outside = ~kept.repeat_interleave(experts // spec.groups, dim=1)
    low, high = (bound.masked_fill(outside, spec.group_mask) for bound in interval(compared))
    ids = compared.exact.masked_fill(outside, spec.group_mask).topk(spec.top_k).indices
    picked = torch.zeros_like(outside).scatter(1, ids, True)
    certain = _apart(picked, Interval(low, high)) & _apart(kept, group_scores(compared, spec))
    if spec.selector == "sparsemixer":  # weights depend on the order
        certain &= (low.gather(1, ids)[:, :-1] > high.gather(1, ids)[:, 1:]).all(1)
    return ids, certain


def _apart(picked: Tensor, bounds: Interval) -> Tensor:
    """[T] bool: whether every picked one exceeds all others of its row beyond all errors."""
    worst = bounds.low.masked_fill(~picked, torch.inf).amin(1)
    return worst > bounds.high.masked_fill(picked, -torch.inf).amax(1)


def choose(inputs: RouteInputs, logits: Value | None, stored: torch.dtype) -> Choice:
    """The oracle's own routing of every row, with weights handed on in `stored`.

    logits: with their errors where the engine computes them itself. Raises Undecided if rounding could change an
    expert: the inputs are then no good.
    """
    spec, dtype = inputs.routing, inputs.logits.dtype
    given = Value.of(inputs.logits) if logits is None else logits
    compared = compared_value(given, spec, inputs.tensors, dtype)
    if spec.selector == "table":
        ids = ids_of_table(inputs)
        certain = torch.ones(len(ids), dtype=torch.bool)
    else:
        ids, certain = best(compared, spec)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if spec.skip_expert:
        dropped = ids == compared.exact.shape[1] - 1
    if spec.capacity is not None:
        found = room_of(given, compared, inputs)
        keeps, drops = found.keeps.gather(1, ids), found.drops.gather(1, ids)
        certain, dropped = certain & (keeps ^ drops).all(1), drops
    if not certain.all():
        rows = (~certain).nonzero().flatten().tolist()
        raise Undecided(f"inputs are no good: rounding may change the experts of rows {rows}")
    weights, shared = weights_value(given, ids, spec, inputs.tensors, dtype, dropped, stored=stored)
    return Choice(ids.masked_fill(dropped, -1), weights, shared)


def ids_of_table(inputs: RouteInputs) -> Tensor:
    """The experts that a table has for each token id, [T, K]."""
    if inputs.token_ids is None:
        raise ValueError("inputs are no good: token_ids: got None, want one a row; a table chooses by token id")
    return inputs.tensors["router.table"][inputs.token_ids].long()


def room_of(given: Value, compared: Value, inputs: RouteInputs, numbers: Tensor | None = None) -> Room:
    """Which pairs find a place. numbers: [T] bool, rows whose scores are known; others may choose anything."""
    spec = inputs.routing
    if spec.groups > 1 or spec.capacity is None or spec.select_on != "scores":
        raise ValueError(f"got {spec}, want a capacity, no groups and scores that are compared")
    store = in_precision(inputs.logits.dtype, spec.score_dtype)
    scores = interval(score(routed_logits(conditioned(given, spec, store), spec), spec, store))
    bounds = interval(compared)
    may_be_first = choices(bounds, 1)[0][..., 0]  # [T, E]
    lowest = scores.low.masked_fill(~may_be_first, torch.inf).amin(1)
    first = Interval(lowest, scores.high.masked_fill(~may_be_first, -torch.inf).amax(1))
    if numbers is not None:
        bounds, first = _anything(bounds, numbers[:, None]), _anything(first, numbers)
    return room(bounds, first, spec.capacity, inputs.sequences, spec.top_k)


def _anything(bounds: Interval, numbers: Tensor) -> Interval:
    return Interval(bounds.low.where(numbers, -torch.inf), bounds.high.where(numbers, torch.inf))


def without_expert(answer: Routing, spec: RoutingSpec) -> Tensor:
    """[T, K] bool, pairs without an expert: id -1, and weight 0 if the model skips or drops pairs."""
    none = answer.ids < 0
    return none | (answer.weights == 0) if spec.capacity is not None or spec.skip_expert else none
