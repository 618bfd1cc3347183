"""A router chooses and weighs by the model's method: score, bias, groups, top-k, renormalisation, scale, in order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.judging.layouts import or_refused
from moe_conformance.oracle.routing import judge_names, judge_routing
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.route.cases import METHOD_CASES, NONE_CASES, SHIFT_CASES, TIE_CASES, UNIQUE_CASES
from moe_conformance.suites.route.inputs import inputs_of

# Added to all logits: far beyond the overflow of exp in float32, as far as two-byte dtypes stay exact.
SHIFT = {torch.float32: 1024.0, torch.float16: 64.0, torch.bfloat16: 8.0}


def routed(engine: Any, what: str, inputs: RouteInputs) -> Routing:
    """The engine's answer on the CPU, with its form checked: ids integer [T, slots], weights float32 of that shape, or
    in the logits' dtype where scores are. Raises Unsupported where it refuses strides of logits, in whatever words."""

    def route(logits: Tensor) -> Any:
        return engine.route(to_device(replace(inputs, logits=logits), engine.info.device))

    if inputs.logits.is_contiguous():
        ids, weights = route(inputs.logits)
    else:
        strided, plain = partial(route, inputs.logits), partial(route, inputs.logits.contiguous())
        ids, weights = or_refused("route", "strides of logits", strided, plain)
    shape = (len(inputs.logits), inputs.slots)
    ids = compare.numbers(f"{what}: ids", ids, shape, integer=True)
    weights = compare.numbers(f"{what}: weights", weights, shape, integer=False)
    allowed = {torch.float32} | ({inputs.logits.dtype} if inputs.routing.score_dtype == "input" else set())
    if weights.dtype not in allowed:
        raise Nonconformance(f"{what}: weights: got {weights.dtype}, want {' or '.join(map(str, allowed))}")
    return Routing(ids.long(), weights)


@check((*METHOD_CASES, *TIE_CASES, *NONE_CASES))
def test_ids_and_weights_are_those_of_the_method(engine: Any, case: Case) -> None:
    """Route once: every row of numbers gets the experts and the weights that float64 gives it; of ties any."""
    inputs = inputs_of(case)
    answer = routed(engine, "route", inputs)
    numbers = inputs.logits.isfinite().all(-1)
    if not numbers.all():  # what stands between these rows is for the class of rows that are no numbers
        inputs, answer = replace(inputs, logits=inputs.logits[numbers]), Routing(*(part[numbers] for part in answer))
    judge_routing("route", answer, inputs)


@check(SHIFT_CASES)
def test_a_constant_added_to_all_logits_changes_nothing(engine: Any, case: Case) -> None:
    """Route the logits plus and minus a large constant: the answer is still that of the logits themselves."""
    inputs = inputs_of(case)
    for shift in (SHIFT[inputs.logits.dtype], -SHIFT[inputs.logits.dtype]):
        what = f"route of logits {shift:+g}"
        shifted = replace(inputs, logits=inputs.logits + shift)
        judge_routing(what, routed(engine, what, shifted), inputs, shift=shift)


@check(UNIQUE_CASES)
def test_ids_are_unique_and_in_range_for_any_row(engine: Any, case: Case) -> None:
    """Route rows of ties, NaN and infinities: K different experts each, whichever, and whatever their weights."""
    inputs = inputs_of(case)
    judge_names("route", routed(engine, "route", inputs), inputs)


@check(UNIQUE_CASES)
def test_the_same_logits_give_the_same_bits_again(engine: Any, case: Case) -> None:
    """Route, route something else, route again: same ids, same weights, and the logits untouched."""
    inputs = inputs_of(case)
    logits = inputs.logits.clone()
    first = routed(engine, "route", inputs)
    routed(engine, "route", replace(inputs, logits=inputs.logits.flip(0)))
    again = routed(engine, "route again", inputs)
    compare.equal("ids of the second run against the first", again.ids, first.ids)
    compare.equal("weights of the second run against the first", again.weights, first.weights)
    compare.equal("logits after routing", inputs.logits, logits)
