"""Rows behind the tokens are padding: what they hold never changes a token's row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import PADDING_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(PADDING_CASES)
def test_padding_rows_change_no_token(engine: Any, case: Case) -> None:
    """Tokens are routed by their method, and keep their bits when the padding holds something else."""
    inputs = inputs_of(case)
    tokens = case["tokens"]
    first = routed(engine, "route", inputs)
    judge_routing("route", first, inputs)
    other = inputs.logits.clone()
    other[tokens:] = inputs.logits[:1].flip(-1)
    second = routed(engine, "route with other padding", replace(inputs, logits=other))
    compare.equal("ids of the tokens, with other padding", second.ids[:tokens], first.ids[:tokens])
    compare.equal("weights of the tokens, with other padding", second.weights[:tokens], first.weights[:tokens])
