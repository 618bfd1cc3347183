"""Scores, selection and weights keep the precision that the model says, whatever the logits are stored in."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import PRECISION_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(PRECISION_CASES)
def test_scores_keep_their_bits(engine: Any, case: Case) -> None:
    """Logits whose scores in two bytes are other numbers, or tie: experts and weights are still those of float32."""
    inputs = inputs_of(case)
    judge_routing("route", routed(engine, "route", inputs), inputs)
