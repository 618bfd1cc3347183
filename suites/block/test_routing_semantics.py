"""A family's router chooses and weighs by its own method, from the block's input."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.block.blocks import inputs_of
from moe_conformance.suites.block.cases import NARROW_ROUTE_CASES, ROUTE_CASES
from moe_conformance.suites.block.configs import spec_of
from moe_conformance.suites.block.judging import answer, judge_router, reported


@check(ROUTE_CASES)
@torch.no_grad()
def test_a_block_routes_as_its_model_does(engine: Any, case: Case) -> dict[str, Any]:
    """Ids and weights as the experts get them, in any order within a row; a pair of weight 0 is no pair."""
    inputs = inputs_of(case)
    routing = reported(answer(engine, inputs))
    judge_router(inputs, spec_of(case["family"]), routing)
    rows = zip(routing.ids.tolist(), routing.weights.tolist(), strict=True)
    names = [sorted(i for i, w in zip(*row, strict=True) if w) for row in rows]
    return {"experts of the first tokens": [" ".join(map(str, row)) for row in names[:5]]}


@check(NARROW_ROUTE_CASES)
@torch.no_grad()
def test_a_block_in_a_narrow_dtype_routes_as_its_model_does(engine: Any, case: Case) -> None:
    """In bfloat16, from the engine's own logits: the experts are a best K within the logits' errors, and the weights
    theirs. Scores that the model has in float32 must be."""
    inputs = inputs_of(case)
    judge_router(inputs, spec_of(case["family"]), reported(answer(engine, inputs)))
