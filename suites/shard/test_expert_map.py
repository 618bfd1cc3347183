"""A rank's part is of its own pairs, and the parts of all ranks sum to the layer."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.shard.cases import NOTHING, OUT_OF_RANGE, SUMS
from moe_conformance.suites.shard.ranks import (
    held_pairs,
    judge_sum,
    name_of,
    part_of,
    ranks,
    same_part,
    unsharded,
    with_pairs,
)


@check(SUMS)
@torch.no_grad()
def test_parts_sum_to_the_layer(engine: Engine, case: Case) -> None:
    """What the ranks return adds up to the layer computed in one piece; every fresh allocation is poisoned."""
    layer = unsharded(case)
    judge_sum(engine, "sum of the ranks' parts", layer, ranks(case, layer))


@check(NOTHING)
@torch.no_grad()
def test_pairs_of_others_contribute_exactly_zero(engine: Engine, case: Case) -> None:
    """A token without an expert on the rank gets zeros, and no other pair's weight changes a bit of a rank's part."""
    layer = unsharded(case)
    for inputs in ranks(case, layer):
        what, mine = name_of(inputs), held_pairs(inputs)
        x, ids, weights = inputs.whole.x, inputs.whole.ids, inputs.whole.weights
        other = weights * -3 + 1
        if case["poison"]:
            nowhere = (ids < 0).all(-1, keepdim=True)
            x, other = x.masked_fill(nowhere, float("nan")), torch.full_like(other, float("nan"))
        first = part_of(engine, inputs)
        second = part_of(engine, with_pairs(inputs, x=x, weights=torch.where(mine, weights, other)))
        idle_rows = second.masked_fill(mine.any(-1, keepdim=True), 0.0)
        compare.equal(f"{what}, tokens without an expert here", idle_rows, torch.zeros_like(second))
        same_part(engine, f"{what}, other weights for pairs of others", second, first, inputs)


@check(OUT_OF_RANGE)
@torch.no_grad()
def test_ids_out_of_range_never_name_an_expert(engine: Engine, case: Case) -> None:
    """A batch with an id outside [-1, E) raises, or gives the part that it gives with -1 in its place."""
    layer = unsharded(case)
    ids = layer.whole.ids.clone()
    ids[0, 1] = ids[3, 0] = -1
    outside = ids.clone()
    outside[0, 1] = outside[3, 0] = case["outside"]
    for inputs in ranks(case, with_pairs(layer, ids=ids)):
        want = part_of(engine, inputs)
        try:
            got = part_of(engine, with_pairs(inputs, ids=outside))
        except (Unsupported, Nonconformance):
            raise
        except Exception:
            continue
        same_part(engine, f"{name_of(inputs)} with ids of {case['outside']}", got, want, inputs)
