"""Cases full of ties: engines may break ties at random, but must not choose anything worse than the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.errors import Nonconformance
from moe_conformance.oracle.routing import judge_names, judge_routing
from moe_conformance.reference_impl.routing import route
from moe_conformance.suites.route.cases import TIE_CASES, UNIQUE_CASES
from moe_conformance.suites.route.inputs import inputs_of

BY_CAPACITY = tuple(case for case in TIE_CASES if case["routing"].capacity is not None)


def id_of(case: Case) -> str:
    return case.id


def at_random(inputs: RouteInputs, seed: int) -> Routing:
    """A correct router in float64, in which noise far below any rounding decides ties of experts, groups and tokens."""
    noise = torch.rand(inputs.logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids, weights = route(replace(inputs, logits=inputs.logits.double() + noise * 1e-11))
    return Routing(ids, weights.float())


@pytest.mark.parametrize("case", TIE_CASES, ids=id_of)
def test_ties_may_be_broken_at_random(case: Case) -> None:
    inputs = inputs_of(case)
    for seed in range(3):
        judge_routing("route", at_random(inputs, seed), inputs)


@pytest.mark.parametrize("case", [case for case in UNIQUE_CASES if case["tokens"]], ids=id_of)
def test_rows_of_any_kind_have_some_experts(case: Case) -> None:
    inputs = inputs_of(case)
    judge_names("route", at_random(inputs, 0), inputs)


def test_random_ties_are_ties_of_experts_and_of_tokens() -> None:
    """With a capacity, ties decide which expert a token wants and which token gets a place."""
    places = []
    for case in BY_CAPACITY:
        answers = [at_random(inputs_of(case), seed) for seed in range(3)]
        first, second, third = ([sorted(row) for row in ids.tolist()] for ids, _ in answers)
        assert first != second != third
        places.append(len({tuple((weights == 0).sum(1).tolist()) for _, weights in answers}))
    assert max(places) == 3


def worst_first(inputs: RouteInputs, answer: Routing) -> Routing:
    """A token that has a place, and whose logits differ, takes the smallest."""
    has_place, differ = (answer.weights > 0).all(1), inputs.logits.amax(1) > inputs.logits.amin(1)
    token = int((has_place & differ).nonzero()[0])
    answer.ids[token, 0] = inputs.logits[token].argmin()
    return answer


def nobody_dropped(inputs: RouteInputs, answer: Routing) -> Routing:
    """One expert takes every token."""
    answer.ids[:, 0] = 3
    return Routing(answer.ids, answer.weights.clamp(min=0.125))


@pytest.mark.parametrize("case", BY_CAPACITY, ids=id_of)
def test_ties_excuse_no_expert_that_is_worse_and_no_expert_that_takes_too_many(case: Case) -> None:
    inputs = inputs_of(case)
    for wrong in (worst_first(inputs, at_random(inputs, 0)), nobody_dropped(inputs, at_random(inputs, 0))):
        with pytest.raises(Nonconformance, match=r"wrong experts|different experts"):
            judge_routing("route", wrong, inputs)


@pytest.mark.parametrize("case", [case for case in BY_CAPACITY if not case["routing"].capacity.by_weight], ids=id_of)
def test_the_first_token_has_a_place_whatever_ties(case: Case) -> None:
    inputs = inputs_of(case)
    answer = at_random(inputs, 0)
    answer.ids[0] = -1
    with pytest.raises(Nonconformance, match="wrong experts"):
        judge_routing("route", answer, inputs)
