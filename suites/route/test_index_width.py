"""Rows of logits are found where they lie, also beyond what 32 bits count."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import FAR_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(FAR_CASES)
def test_elements_beyond_32_bits_are_found(engine: Any, case: Case) -> None:
    """Ids and weights are those of the method, as they are where all lies close together."""

    def judge(given: Any) -> None:
        inputs = inputs_of(case, given)
        judge_routing("route", routed(engine, "route", inputs), inputs)

    assert_honoured("route", {"logits": case["layout"]}, judge)
