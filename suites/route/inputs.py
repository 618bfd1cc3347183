"""From a route case to its inputs: logits of many kinds, and the tensors that its method takes."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.judging.inputs import bits, distinct_logits, integers, normal
from moe_conformance.judging.layouts import given_as
from moe_conformance.model.specs import LogitsSpec, RoutingSpec, router_tensors
from moe_conformance.protocol.routing import RouteInputs

NAN, INF = float("nan"), float("inf")
VOCABULARY = 48
# Spread of a selection bias: about that of the scores it is added to.
BIAS_STD = {"softmax": 2.0**-6, "sigmoid": 2.0**-2, "sqrt_softplus": 2.0**-1}


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


def fine(shape: tuple[int, ...], seed: str, std: float) -> Tensor:
    """As `normal`, with all the bits of a float32: what is stored in two bytes on the way is another number."""
    rough = normal(shape, seed, torch.float64, std)
    return (rough + normal(shape, f"{seed}-fine", torch.float64, std * 2.0**-9)).float().double()


def logits_of(case: Case) -> Tensor:
    """[T, classes] float64 values that the case's dtype holds exactly."""
    spec: RoutingSpec = case["routing"]
    tokens, classes, kind = case["tokens"], spec.classes(case["experts"]), case["logits"]
    shape = (tokens, classes)
    match kind:
        case "distinct":
            return distinct_logits(tokens, classes, case.id, torch.float64)
        case "normal":
            return normal(shape, case.id, torch.float64, std=4.0)
        case "fine":
            values = fine(shape, case.id, std=2.0)
            if spec.capacity is not None:  # one token in three wants the last expert, the others the first: too many
                wanted = torch.where(torch.arange(tokens) % 3 == 2, classes - 1, 0)
                values[torch.arange(tokens), wanted] += 10
            return values
        case "close":  # neighbours in the dtype, of both signs, whose scores two bytes do not hold apart
            eps = torch.finfo(getattr(torch, case["dtype"])).eps
            first, steps = (1 / 4, 2048) if case["dtype"] == "float32" else (1 / 64, round(1 / eps))
            order = bits(shape, case.id).argsort(dim=-1) - classes // 2
            place = torch.where(order < 0, -1 - order, order)
            sizes = first * 2.0 ** (place // steps) * (1 + (place % steps) / steps)
            return torch.where(order < 0, -sizes, sizes)
        case "tiny":  # the sigmoid's scores are exp of these, about the number that is added to their sum
            return fine(shape, case.id, std=0.5) + math.log(spec.epsilon) / spec.logit_scale
        case "wide":  # spans 1e4: most scores underflow
            return normal(shape, case.id, torch.float64, std=2048.0)
        case "negative":
            return distinct_logits(tokens, classes, case.id, torch.float64) - 128
        case "one-sign":  # rows in turn just below zero, far below it and far above it
            far = 1024.0 if spec.score == "softmax" or spec.select_on == "logits" else 16.0
            sides = torch.tensor((-4.0, -far, far), dtype=torch.float64)[torch.arange(tokens) % 3, None]
            return (fine(shape, case.id, std=0.5) + sides).float().double()
        case "equal":
            return normal((tokens, 1), case.id, torch.float64).expand(shape).contiguous()
        case "tied":  # three values, one of them zero of either sign
            sign = 1.0 - 2.0 * integers(shape, f"{case.id}-sign", 2)
            return integers(shape, case.id, 2) * sign
        case "tied-groups":  # every group has the same values, each in an order of its own
            order = bits((tokens, spec.groups, classes // spec.groups), case.id).argsort(dim=-1)
            return (order.double() / 8).flatten(1)
        case "last-place":  # one value at the places K - 1 to K + 1 of each row
            values = distinct_logits(tokens, classes, case.id, torch.float64)
            ranked = values.argsort(dim=-1, descending=True)[:, max(spec.top_k - 2, 0) : spec.top_k + 1]
            return values.scatter(1, ranked, values.gather(1, ranked[:, :1]).expand(ranked.shape))
        case "beside" | "not-numbers":
            return not_numbers(distinct_logits(tokens, classes, case.id, torch.float64))
    raise ValueError(f"{case.id}: logits: got {kind!r}")


def bias_of(case: Case, size: int) -> Tensor:
    """[size] float32; where ties are tried it is one of two numbers, or one, so that they stay ties."""
    spec: RoutingSpec = case["routing"]
    std = 0.5 if spec.select_on == "logits" else BIAS_STD[spec.score]
    seed = f"{case.id}-bias"
    if case["logits"] == "tied":
        return integers((size,), seed, 2).float() * std
    if case["logits"] in ("tied-groups", "last-place", "equal"):
        return torch.full((size,), std)
    if case["logits"] == "tiny":  # of a size with the scores: all are chosen by both
        return (fine((size,), seed, 0.25) * spec.epsilon).float()
    if case["logits"] == "close":  # as far apart as the scores are
        std = 2.0**-10
    return (fine((size,), seed, std) + constant_of(case)).float()


def constant_of(case: Case) -> float:
    """What is added to all biases, and changes nothing: experts of other groups, and lanes beyond the last expert, are
    then below or above whatever number stands for them. Added to scores, not to probabilities of about 1 / E."""
    spec: RoutingSpec = case["routing"]
    if spec.score == "softmax" or spec.select_on == "logits":
        return 0.0
    return 8.0 if case["experts"] in (128, 512) else -8.0


def tensors_of(case: Case) -> dict[str, Tensor]:
    """What the method takes beside logits; scales are distinct, of both signs, and never 1."""
    spec: RoutingSpec = case["routing"]
    experts = case["experts"]
    found: dict[str, Tensor] = {}
    for name, shape in router_tensors(LogitsSpec(), spec, 1, experts, VOCABULARY).items():
        match name:
            case "router.selection_bias":
                found[name] = bias_of(case, shape[0])
            case "router.per_expert_scale":
                order = bits(shape, f"{case.id}-scale").argsort().double()
                found[name] = ((order - experts // 4) / 32 + 1 / 64).to(getattr(torch, case["dtype"]))
            case "router.global_scale":
                found[name] = torch.tensor([1.375])
            case "router.table":
                order = bits((VOCABULARY, experts), f"{case.id}-table").argsort(dim=-1)
                found[name] = order[:, : spec.top_k].contiguous()
    return found


def padded(logits: Tensor, rows: int) -> Tensor:
    """With so many rows behind: larger than all others, NaN, infinite, in turn."""
    behind = torch.stack([torch.full_like(logits[0], (1e4, NAN, INF, -INF)[row % 4]) for row in range(rows)])
    return torch.cat([logits, behind])


def inputs_of(case: Case, given: Collection[str] | None = None) -> RouteInputs:
    """The case's inputs on the CPU. given: as for experts (suites/experts/inputs.py)."""
    spec: RoutingSpec = case["routing"]
    as_given = partial(given_as, {"logits": case["layout"]}, given)
    logits = as_given("logits", logits_of(case).to(getattr(torch, case["dtype"])))
    rows = case.recipe.get("padding_rows", 0)
    logits = padded(logits, rows) if rows else logits
    token_ids = integers((len(logits),), f"{case.id}-tokens", VOCABULARY) if spec.selector == "table" else None
    return RouteInputs(
        logits,
        spec,
        tensors_of(case),
        token_ids=token_ids,
        sequences=case.recipe.get("sequences", 1),
        valid_rows=case["tokens"] if rows else None,
        fused_shared=case.recipe.get("fused_shared"),
    )
