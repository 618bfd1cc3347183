"""Scores, selection and weights keep the precision that the model says, whatever the logits are stored in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import PRECISION_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(PRECISION_CASES)
def test_scores_keep_their_bits(engine: Any, case: Case) -> None:
    """Logits whose scores in two bytes are other numbers, or tie: experts and weights are still those of float32.

    A router that is wrong for the same logits stored in float32 is for the checks of the method.
    """

    def judge(given: Any) -> None:
        inputs = inputs_of(case)
        inputs = inputs if given else replace(inputs, logits=inputs.logits.float())
        judge_routing("route", routed(engine, "route", inputs), inputs)

    if case["dtype"] == "float32":
        judge("as they are")
    else:
        assert_honoured("route", {"logits": case["dtype"]}, judge)
