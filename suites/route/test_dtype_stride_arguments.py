"""Routers read logits as they are given, or refuse them."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import ARGUMENT_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(ARGUMENT_CASES)
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """Ids and weights are those of the values, wherever in memory they lie."""

    def judge(given: Any) -> None:
        inputs = inputs_of(case, given)
        judge_routing("route", routed(engine, "route", inputs), inputs)

    assert_honoured("route", {"logits": case["layout"]}, judge)
