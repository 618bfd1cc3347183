"""Every id and every weight is written, whatever was in the memory that they lie in."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.oracle.routing import judge_names
from moe_conformance.suites.route.cases import WRITTEN_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(WRITTEN_CASES)
def test_every_element_is_written(engine: Any, case: Case) -> None:
    """Fresh memory is NaN or the largest integer, and no logit is: neither is any weight or id."""
    inputs = inputs_of(case)
    with poisoned_allocations():
        answer = routed(engine, "route", inputs)
    compare.written("route: weights", answer.weights)
    judge_names("route", answer, inputs)
