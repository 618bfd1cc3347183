"""A router selects and weighs by the model's method: softmax over all experts, top-k, renormalisation, scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import bits, distinct_logits, integers, normal, poison_
from moe_conformance.oracle.tolerance import Bound, relative, softmax_weights, unit_roundoff
from moe_conformance.suites.route.cases import METHOD_CASES, SHIFT_CASES, UNIQUE_CASES

NAN, INF = float("nan"), float("inf")
# Added to all logits: far beyond the overflow of exp in float32, as far as two-byte dtypes stay exact.
SHIFT = {torch.float32: 1024.0, torch.float16: 64.0, torch.bfloat16: 8.0}


def not_numbers(values: Tensor) -> Tensor:
    """Seven rows in eight get NaN or infinities, each in another way; every eighth, from row 3, is left as it is."""
    rows, experts = values.shape
    first, other = 0, experts - 1
    for row in range(rows):
        match row % 8:
            case 0:
                values[row] = NAN
            case 1:
                values[row, other] = NAN
            case 2:
                values[row, ::2] = NAN
            case 4:
                values[row] = -INF
            case 5:
                values[row, first] = INF
            case 6:
                values[row, first + 1 :] = -INF
            case 7:
                values[row, :] = INF
                values[row, other] = NAN
    return values


def logits_of(case: Case) -> Tensor:
    """[T, E] float64 values that the case's dtype holds exactly."""
    tokens, experts, kind = case["tokens"], case["experts"], case["logits"]
    shape = (tokens, experts)
    match kind:
        case "distinct":
            return distinct_logits(tokens, experts, case.id, torch.float64)
        case "normal":
            return normal(shape, case.id, torch.float64, std=4.0)
        case "wide":  # spans 1e4: most scores underflow
            return normal(shape, case.id, torch.float64, std=2048.0)
        case "negative":
            return distinct_logits(tokens, experts, case.id, torch.float64) - 128
        case "equal":
            return normal((tokens, 1), case.id, torch.float64).expand(shape).contiguous()
        case "tied":  # three values, one of them zero of either sign
            sign = 1.0 - 2.0 * integers(shape, f"{case.id}-sign", 2)
            return integers(shape, case.id, 2) * sign
        case "beside" | "not-numbers":
            return not_numbers(distinct_logits(tokens, experts, case.id, torch.float64))
    raise ValueError(f"{case.id}: logits: got {kind!r}")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, with the strides of the layout and poison between them."""
    tokens, experts = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.T.contiguous().T
    room = poison_(torch.empty(tokens, 2 * experts + 3, dtype=values.dtype))
    view = room[:, 1 : 2 * experts : 2]
    return view.copy_(values)


def inputs_of(case: Case) -> RouteInputs:
    """The case's inputs; per-expert scales are distinct, of both signs, and never 1."""
    dtype, experts = getattr(torch, case["dtype"]), case["experts"]
    logits = laid_out(logits_of(case).to(dtype), case["layout"])
    scale = None
    if case["method"] == "gemma4":
        order = bits((experts,), f"{case.id}-scale").argsort().double()
        scale = ((order - experts // 4) / 32 + 1 / 64).to(dtype)
    return RouteInputs(logits, case["top_k"], case["method"], scale)


def shaped(what: str, inputs: RouteInputs, answer: Any) -> Routing:
    """The answer with its form checked: ids [T, K] integer, weights [T, K] float32, on the CPU."""
    ids, weights = answer
    shape = (inputs.logits.shape[0], inputs.top_k)
    compare.shape_and_type(f"{what}: ids", ids, shape, integer=True)
    compare.shape_and_type(f"{what}: weights", weights, shape, integer=False)
    if weights.dtype != torch.float32:
        raise Nonconformance(f"{what}: weights: got {weights.dtype}, want torch.float32")
    return Routing(ids.detach().cpu().long(), weights.detach().cpu())


def judge(what: str, inputs: RouteInputs, answer: Routing, shift: float = 0.0) -> None:
    """Ids must be a top K of these logits up to ties, weights what float64 gives at the reported ids.

    shift: what the engine had added to all logits. One that computes exp(l - logsumexp) rounds a number of its size,
    once, and that error of an exponent is a relative error of every weight.
    """
    logits = inputs.logits.double()
    if not logits.shape[0]:
        return
    roundings = softmax_weights(logits, inputs.top_k) + 2 * abs(shift)

    # Scores are compared as logits: a relative error of a score is an absolute one of its logarithm. Scores below the
    # smallest normal float32 may all be flushed to zero, and then tie; the softmax's denominator is at most E.
    tiny = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float64)
    floor = logits.amax(-1, keepdim=True) + tiny.log() + torch.tensor(logits.shape[1]).log()
    compare.chosen(f"{what}: ids", answer.ids, logits.maximum(floor), roundings * unit_roundoff(torch.float32))

    want = logits.softmax(-1).gather(-1, answer.ids)  # [T, K]
    if inputs.method != "softmax_topk":
        want = want / want.sum(-1, keepdim=True)
    if inputs.per_expert_scale is not None:
        want = want * inputs.per_expert_scale.double()[answer.ids]
    bound = relative(want, roundings, torch.float32, "softmax over E, top-k, renormalisation, scale")
    stored = inputs.logits.dtype
    if inputs.method != "gemma4" and stored != torch.float32:
        # Qwen2-MoE, where the method comes from, rounds its weights to the model's dtype; Gemma 4 does not.
        rounded = relative(want, 1, stored, "weights stored in the model's dtype")
        bound = Bound(bound.limit + rounded.limit, f"{bound.origin}; plus {rounded.origin}")
    compare.close(f"{what}: weights", answer.weights, want, bound)


@check(METHOD_CASES)
def test_ids_and_weights_are_those_of_the_method(engine: Any, case: Case) -> None:
    """Route once: every row of numbers gets the experts and the weights that float64 gives it."""
    inputs = inputs_of(case)
    answer = shaped("route", inputs, engine.route(inputs))
    numbers = inputs.logits.isfinite().all(-1)
    judge(
        "route",
        replace(inputs, logits=inputs.logits[numbers]),
        Routing(answer.ids[numbers], answer.weights[numbers]),
    )


@check(SHIFT_CASES)
def test_a_constant_added_to_all_logits_changes_nothing(engine: Any, case: Case) -> None:
    """Route the logits plus and minus a large constant: the answer is still that of the logits themselves."""
    inputs = inputs_of(case)
    for shift in (SHIFT[inputs.logits.dtype], -SHIFT[inputs.logits.dtype]):
        shifted = replace(inputs, logits=inputs.logits + shift)
        what = f"route of logits {shift:+g}"
        judge(what, inputs, shaped(what, shifted, engine.route(shifted)), shift)


@check(UNIQUE_CASES)
def test_ids_are_unique_and_in_range_for_any_row(engine: Any, case: Case) -> None:
    """Route rows of NaN, infinities and ties: K different experts each, whatever the weights."""
    inputs = inputs_of(case)
    ids, _ = shaped("route", inputs, engine.route(inputs))
    compare.chosen("route: ids", ids, torch.zeros(inputs.logits.shape), slack=0.0)


@check(UNIQUE_CASES)
def test_the_same_logits_give_the_same_bits_again(engine: Any, case: Case) -> None:
    """Route, route something else, route again: same ids, same weights, and the logits untouched."""
    inputs = inputs_of(case)
    logits = inputs.logits.clone()
    first = shaped("route", inputs, engine.route(inputs))
    engine.route(replace(inputs, logits=inputs.logits.flip(0)))
    again = shaped("route again", inputs, engine.route(inputs))
    compare.equal("ids of the second run against the first", again.ids, first.ids)
    compare.equal("weights of the second run against the first", again.weights, first.weights)
    compare.equal("logits after routing", inputs.logits, logits)
