"""Which sets of experts are acceptable: against every combination of groups, a queue by hand, and the clock."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import Capacity, RouteInputs, RoutingSpec
from moe_conformance.oracle.capacity import Interval, Room, choices, fitting, places, room
from moe_conformance.oracle.choice import accepted, best, choose, group_scores
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl.capacity import over_capacity

FP32, FP64 = torch.float32, torch.float64


def value(exact: Tensor, limit: Tensor) -> Value:
    return Value(exact.double(), torch.full_like(limit, 1e6).double(), limit.double())


def by_enumeration(ids: list[int], exact: list[float], limit: list[float], spec: RoutingSpec) -> bool:
    """Whether some groups may be the best, among which these are the best experts: every combination is tried."""
    size, many = len(exact) // spec.groups, 2 if spec.group_score == "top2_sum" else 1
    members = [range(group * size, (group + 1) * size) for group in range(spec.groups)]
    high = [sum(sorted((exact[e] + limit[e] for e in group), reverse=True)[:many]) for group in members]
    low = [sum(sorted((exact[e] - limit[e] for e in group), reverse=True)[:many]) for group in members]
    for kept in combinations(range(spec.groups), spec.top_groups):
        gone = [group for group in range(spec.groups) if group not in kept]
        if gone and min(high[g] for g in kept) < max(low[g] for g in gone):
            continue
        inside = {expert for group in kept for expert in members[group]}
        upper = [exact[e] + limit[e] if e in inside else spec.group_mask for e in range(len(exact))]
        lower = [exact[e] - limit[e] if e in inside else spec.group_mask for e in range(len(exact))]
        left = [lower[e] for e in range(len(exact)) if e not in ids]
        if not left or min(upper[e] for e in ids) >= max(left):
            return True
    return False


@pytest.mark.parametrize("mask", [-math.inf, 0.0, 1.0])
@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (3, 1), (3, 2), (4, 2), (4, 4)])
def test_acceptable_sets_are_those_of_every_combination_of_groups(
    groups: int, top_groups: int, score: str, mask: float
) -> None:
    """Small whole numbers with errors of halves: ties of experts, of groups, and of what the mask makes equal."""
    random = torch.Generator().manual_seed(groups * 10 + top_groups)
    rows, experts, top_k = 6, 12, 4
    spec = RoutingSpec(top_k, groups=groups, top_groups=top_groups, group_score=score, group_mask=mask)
    exact = torch.randint(-3, 6, (rows, experts), generator=random).double()
    limit = torch.randint(0, 3, (rows, experts), generator=random) / 4
    sets = list(combinations(range(experts), top_k))
    compared = value(exact.repeat(len(sets), 1), limit.repeat(len(sets), 1))
    found = accepted(torch.tensor(sets).repeat_interleave(rows, 0), compared, spec).reshape(len(sets), rows)
    # The sum of two is rounded once more, which whole numbers and quarters never are.
    want = [
        [by_enumeration(ids, *row, spec) for row in zip(exact.tolist(), limit.tolist(), strict=True)] for ids in sets
    ]
    assert torch.equal(found, torch.tensor(want))
    assert found.any(0).all()
    assert not found.all(0).any()


def test_acceptable_sets_of_32_groups_are_found_in_a_moment() -> None:
    random = torch.Generator().manual_seed(0)
    exact, spec = (
        torch.rand(63, 512, generator=random),
        RoutingSpec(22, groups=32, top_groups=16, group_score="top2_sum"),
    )
    compared = value(exact, torch.full_like(exact, 1e-6))
    ids, certain = best(compared, spec)
    began = time.perf_counter()
    assert accepted(ids, compared, spec).all()
    assert time.perf_counter() - began < 1
    assert certain.double().mean() > 0.9


def test_a_group_s_score_has_the_errors_of_its_members_and_a_rounding_of_their_sum() -> None:
    compared = value(torch.tensor([[4.0, 3.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.25, 2.5, 0.0]]))
    two = RoutingSpec(1, groups=2, top_groups=1, group_score="top2_sum")
    low, high = group_scores(compared, two)
    assert low[0].tolist() == pytest.approx([6.25 * (1 - 2**-24), 0.5 * (1 - 2**-24)], rel=1e-12)
    assert high[0].tolist() == pytest.approx([7.75 * (1 + 2**-24), 5.5 * (1 + 2**-24)], rel=1e-12)
    low, high = group_scores(compared, replace(two, group_score="max"))
    assert (low[0].tolist(), high[0].tolist()) == ([3.5, 2.0], [4.5, 3.5])
    alone = replace(two, groups=4)
    assert group_scores(compared, alone).low[0].tolist() == [3.5, 2.75, -1.5, 2.0]


def test_a_choice_is_certain_where_no_error_changes_it() -> None:
    exact, spec = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), RoutingSpec(2)

    def certain(limit: float, spec: RoutingSpec) -> tuple[list[int], bool]:
        ids, sure = best(value(exact, torch.full_like(exact, limit)), spec)
        return ids[0].tolist(), bool(sure)

    assert certain(0.49, spec) == ([0, 1], True)
    assert certain(0.5, spec) == ([0, 1], False)
    assert certain(0.5, RoutingSpec(4)) == ([0, 1, 2, 3], True)
    groups = RoutingSpec(1, groups=2, top_groups=1)
    assert certain(0.49, groups) == ([0], True)
    assert certain(0.5, groups) == ([0], False)  # of the first two
    two = replace(groups, group_score="top2_sum", top_k=2)
    assert certain(0.99, two) == ([0, 1], True)
    assert certain(1.0, two) == ([0, 1], False)  # of the groups
    assert certain(0.1, replace(two, top_k=3))[1] is False  # more than the kept group has
    assert certain(0.1, replace(two, top_k=3, group_mask=-1.0))[1] is False  # both of the other group count as -1
    mixer = RoutingSpec(2, selector="sparsemixer", select_on="logits")
    assert certain(0.49, mixer) == ([0, 1], True)
    touching = value(torch.tensor([[3.0, 2.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert best(touching, mixer)[1].item() is False
    assert best(touching, spec)[1].item() is True
    assert best(value(exact, torch.tensor([[0.9, 0.2, 0.0, 0.0]])), spec)[1].item() is True
    assert best(value(exact, torch.tensor([[0.9, 0.2, 0.0, 0.0]])), mixer)[1].item() is False  # their order


def test_inputs_whose_experts_rounding_may_change_are_no_good() -> None:
    inputs = RouteInputs(torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 2.0]]), RoutingSpec(1, select_on="logits"))
    with pytest.raises(ValueError, match=r"inputs are no good: rounding may change the experts of rows \[1\]"):
        choose(inputs, None, FP32)
    fine = choose(replace(inputs, logits=inputs.logits[:1]), None, FP32)
    assert (fine.ids.tolist(), fine.weights.exact.tolist(), fine.shared) == ([[0]], [[1.0]], None)
    with pytest.raises(ValueError, match="token_ids: got None"):
        choose(replace(inputs, routing=RoutingSpec(1, selector="table")), None, FP32)
    with pytest.raises(ValueError, match="want a capacity, no groups and scores"):
        choose(replace(inputs, routing=RoutingSpec(1, groups=3, top_groups=3, capacity=Capacity(1))), None, FP32)
    two = replace(inputs, logits=torch.tensor([[3.0, 1.0]]))
    with pytest.raises(ValueError, match="want a capacity, no groups and scores"):
        choose(replace(two, routing=RoutingSpec(1, groups=2, top_groups=2, capacity=Capacity(1))), None, FP32)


def test_inputs_whose_places_rounding_may_change_are_no_good() -> None:
    """Both tokens surely want expert 0, which takes one of them; which weighs more is not sure."""
    spec = RoutingSpec(1, capacity=Capacity(1, by_weight=True))
    exact = torch.tensor([[3.0, 0.0], [3.1, 0.0]])
    inputs = RouteInputs(exact, spec)
    assert choose(inputs, None, FP32).ids.tolist() == [[-1], [0]]
    with pytest.raises(ValueError, match=r"rounding may change the experts of rows \[0, 1\]"):
        choose(inputs, value(exact, torch.full((2, 2), 0.1)), FP32)


def sure(rows: list[list[float]]) -> Interval:
    exact = torch.tensor(rows, dtype=FP64)
    return Interval(exact, exact)


def test_places_are_a_number_twice_the_even_share_or_a_fraction() -> None:
    assert places(Capacity(tokens=3), 100, 7) == 3
    assert places(Capacity(), 22, 7) == 8
    assert places(Capacity(tokens=3, fraction=0.125), 17, 7) == 3
    assert places(Capacity(tokens=3, fraction=0.25), 17, 7) == 5


def test_a_choice_has_a_range_of_places() -> None:
    exact = torch.tensor([[3.0, 2.0, 1.0]], dtype=FP64)
    limit = torch.tensor([[0.0, 0.5, 0.5]], dtype=FP64)
    possible, surely = choices(Interval(exact - limit, exact + limit), 2)
    assert possible[0].tolist() == [[True, False], [False, True], [False, True]]
    assert surely[0].tolist() == [[True, False], [False, False], [False, False]]
    possible, surely = choices(sure([[3.0, 2.0, 1.0]]), 3)
    assert torch.equal(possible, surely)
    assert torch.equal(surely[0], torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize(
    "capacity", [Capacity(2), Capacity(fraction=0.125), Capacity(3, per="batch"), Capacity(2, by_weight=True)]
)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_without_errors_the_queue_is_the_reference_s(capacity: Capacity, top_k: int) -> None:
    random = torch.Generator().manual_seed(top_k)
    scores = torch.randn(24, 5, generator=random).double()
    weights, ids = scores.topk(top_k)
    first = weights[:, 0]
    found = room(Interval(scores, scores), Interval(first, first), capacity, 3, top_k)
    dropped = over_capacity(ids, first, capacity, 5, 3)
    assert torch.equal(found.drops.gather(1, ids), dropped)
    assert torch.equal(found.keeps.gather(1, ids), ~dropped)
    assert int((found.keeps | found.drops).sum()) == ids.numel()
    assert dropped.any()
    assert not dropped.all()


def test_sequences_that_do_not_divide_the_tokens_are_no_good() -> None:
    with pytest.raises(ValueError, match="sequences: got 2 for 3 tokens"):
        room(sure([[1.0]] * 3), Interval(torch.zeros(3), torch.zeros(3)), Capacity(1), 2, 1)


def test_a_near_tie_before_a_pair_leaves_its_place_open() -> None:
    """Two experts of one place. Token 0 may choose either, so both of token 1's and token 2's may be taken."""
    exact = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=FP64)
    limit = torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1]], dtype=FP64)
    bounds = Interval(exact - limit, exact + limit)
    first = Interval(bounds.low.amax(-1), bounds.high.amax(-1))
    found = room(bounds, first, Capacity(1), 1, 1)
    assert found.keeps.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert found.drops.tolist() == [[False, False], [True, False], [False, True], [True, False]]
    by_weight = room(bounds, first, Capacity(1, by_weight=True), 1, 1)  # 3, then 1 and 2 in any order, then 0
    assert by_weight.keeps.tolist() == [[False, False], [False, False], [False, True], [True, False]]
    assert by_weight.drops.tolist() == [[True, True], [True, False], [False, False], [False, False]]


def test_a_lost_expert_still_takes_one_of_the_best_k() -> None:
    """Expert 0 is surely one of the two best and has no place; any one of the others may be the second, not two."""
    bounds = Interval(
        torch.tensor([[4.0, 1.0, 1.0, 1.0]], dtype=FP64), torch.tensor([[4.0, 3.0, 3.0, 3.0]], dtype=FP64)
    )
    drops = torch.tensor([[True, False, False, False]])
    found = Room(keeps=~drops, drops=drops)
    assert fitting(torch.tensor([[False, False, True, False]]), bounds, found, 2).all()
    assert not fitting(torch.tensor([[False, False, True, True]]), bounds, found, 2).any()


def test_what_has_no_place_must_be_among_the_best() -> None:
    """Of the best two, those that may be lost may be missing, and no others."""
    compared = sure([[4.0, 3.0, 2.0, 1.0]])
    found = room(compared, Interval(torch.tensor([4.0]), torch.tensor([4.0])), Capacity(9), 1, 2)

    def fits(*ids: int, lost: tuple[int, ...] = (), bounds: Interval = compared) -> bool:
        mask = torch.zeros(1, 4, dtype=torch.bool)
        drops = mask.index_fill(1, torch.tensor(lost, dtype=torch.long), True)
        picked = mask.index_fill(1, torch.tensor(ids, dtype=torch.long), True)
        return bool(fitting(picked, bounds, found._replace(drops=drops, keeps=found.keeps & ~drops), 2))

    assert fits(0, 1)
    assert not fits(0)
    assert not fits(0, 2)
    assert fits(0, lost=(1,))
    assert fits(1, lost=(0,))
    assert fits(lost=(0, 1))
    assert not fits(lost=(0,))
    assert not fits(lost=(0, 2))
    assert not fits(0, lost=(2, 3))
    assert not fits(0, 1, lost=(1,))  # it has no place
    rough = Interval(compared.low - 0.5, compared.high + 0.5)
    assert fits(0, lost=(2,), bounds=rough)
    assert not fits(0, lost=(3,), bounds=rough)
