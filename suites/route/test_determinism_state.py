"""A routing is of its logits and tensors alone, not of what was called before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import relative
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.suites.route.cases import STATE_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed
from moe_conformance.suites.route.test_token_padding import by_expert


@check(STATE_CASES)
def test_another_call_between_leaves_no_trace(engine: Any, case: Case) -> None:
    """A call, others, the call again; and another router of the same shape is not taken for the first."""
    inputs = inputs_of(case)
    answer = routed(engine, "route", inputs)
    first = by_expert(answer)
    for changes in case["between"]:
        other = inputs_of(replace(case, recipe={**case.recipe, **changes}))
        tensors = {name: tensor.flip(0) for name, tensor in other.tensors.items()}
        other = replace(other, logits=other.logits.flip(0, 1), tensors=tensors)
        try:
            found = routed(engine, "route of another call", other)
        except Exception:
            continue  # what another call raises is for cases of its own
        if not changes and _is_right(answer, inputs):
            judge_routing("route of another router of the same shape, after the first", found, other)
    again = by_expert(routed(engine, "route again", inputs))
    compare.equal("ids of the same call again, against the first", again.ids, first.ids)
    bound = relative(first.weights, 2 * case["experts"], first.weights.dtype, "two sums over all experts")
    compare.close("weights of the same call again, against the first", again.weights, first.weights, bound)


def _is_right(answer: Any, inputs: Any) -> bool:
    try:
        judge_routing("route", answer, inputs)
    except Nonconformance:
        return False
    return True
