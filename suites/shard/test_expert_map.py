"""Experts on several ranks: each in one place, a rank's part is of its own pairs, and the parts sum to the layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, ExpertMapSpec
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.suites.parallel.cases import NOTHING, OUT_OF_RANGE, PLACES, SUMS
from moe_conformance.suites.parallel.ranks import expected, held_pairs, on, parts_sum, ranks, whole


@check(SUMS)
@torch.no_grad()
def test_parts_sum_to_the_layer(engine: Engine, case: Case) -> None:
    """What the ranks return adds up to the layer computed in one piece; every fresh allocation is poisoned."""
    layer = whole(case)
    everybody = ranks(case, layer)
    want, bound = expected(layer, everybody[0].ep_size, case["tp"])
    compare.close("sum of the ranks' parts", parts_sum(engine, everybody), want, bound)


@check(NOTHING)
@torch.no_grad()
def test_pairs_of_others_contribute_exactly_zero(engine: Engine, case: Case) -> None:
    """A token without an expert on the rank gets zeros, and no other pair's weight changes a bit of a rank's part."""
    layer = whole(case)
    for inputs in ranks(case, layer):
        what, mine = f"part of rank ep{inputs.ep_rank} tp{inputs.tp_rank}", held_pairs(inputs)
        x, other = inputs.x, inputs.weights * -3 + 1
        if case["poison"]:
            nowhere = (inputs.ids < 0).all(-1, keepdim=True)
            x, other = x.masked_fill(nowhere, float("nan")), torch.full_like(other, float("nan"))
        with poisoned_allocations():
            first = engine.shard(on(inputs, engine.info.device))
            weights = torch.where(mine, inputs.weights, other)
            second = engine.shard(on(replace(inputs, x=x, weights=weights), engine.info.device))
        idle_rows = second.cpu().masked_fill(mine.any(-1, keepdim=True), 0.0)
        compare.equal(f"{what}, tokens without an expert here", idle_rows, torch.zeros_like(x))
        compare.equal(f"{what}, other weights for pairs of others", second, first)


@check(OUT_OF_RANGE)
@torch.no_grad()
def test_ids_out_of_range_never_name_an_expert(engine: Engine, case: Case) -> None:
    """A batch with an id outside [-1, E) raises, or gives the part that it gives with -1 in its place."""
    layer = whole(case)
    layer.ids[0, 1] = layer.ids[3, 0] = -1
    outside = layer.ids.clone()
    outside[0, 1] = outside[3, 0] = case["outside"]
    for inputs in ranks(case, layer):
        want = engine.shard(on(inputs, engine.info.device))
        try:
            got = engine.shard(on(replace(inputs, ids=outside), engine.info.device))
        except (Unsupported, Nonconformance):
            raise
        except Exception:
            continue
        compare.equal(f"part of rank ep{inputs.ep_rank} with ids of {case['outside']}", got, want)
