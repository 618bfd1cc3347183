"""A token's routing is its own, however many tokens there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import CHUNK_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed

# Fewer than any chunk has.
FEW = 16


@check(CHUNK_CASES)
def test_any_number_of_tokens_is_computed(engine: Any, case: Case) -> None:
    """Ids and weights are those of the method, as they are of the first few tokens."""
    inputs = inputs_of(case)
    few = replace(inputs, logits=inputs.logits[:FEW])

    def judge(many: bool) -> None:
        given = inputs if many else few
        judge_routing("route", routed(engine, "route", given), given)

    assert_holds("route", f"{case['tokens']} tokens", judge)
