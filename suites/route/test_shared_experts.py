"""Shared experts that an engine computes as further routed ones stand behind them, each once, with its own weight."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.oracle.routing import judge_fused_shared
from moe_conformance.suites.route.cases import FUSED_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(FUSED_CASES)
def test_shared_experts_are_the_last_slots(engine: Any, case: Case) -> None:
    """Ids beyond the routed ones in every row, weights by their rule; which experts are chosen is not asked here."""
    inputs = inputs_of(case)
    judge_fused_shared("route", routed(engine, "route", inputs), inputs)
