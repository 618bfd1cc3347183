"""Shared experts that an engine computes as further routed ones stand behind them, each once, with its own weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Routing
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.oracle.routing import judge_fused_shared, judge_routing
from moe_conformance.suites.route.cases import FUSED_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(FUSED_CASES)
def test_shared_experts_are_the_last_slots(engine: Any, case: Case) -> None:
    """Ids beyond the routed ones in every row, weights by their rule."""
    inputs = inputs_of(case)
    judge_fused_shared("route", routed(engine, "route", inputs), inputs)


@check(FUSED_CASES)
def test_shared_experts_oust_no_chosen_one(engine: Any, case: Case) -> None:
    """The slots before them have the experts and the weights that they have without shared experts."""
    inputs = inputs_of(case)
    alone = replace(inputs, fused_shared=None)

    def judge(fused: bool) -> None:
        answer = routed(engine, "route", inputs if fused else alone)
        judge_routing("route", Routing(*(part[:, : alone.slots] for part in answer)), alone)

    assert_holds("route", "shared experts as further slots", judge)
