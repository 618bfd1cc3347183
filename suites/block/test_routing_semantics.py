"""A family's router chooses and weighs by its own method, from the block's input."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.block.blocks import inputs_of, spec_of
from moe_conformance.suites.block.cases import ROUTE_CASES
from moe_conformance.suites.block.expected import Exact, dense
from moe_conformance.suites.block.judging import answer


@check(ROUTE_CASES)
@torch.no_grad()
def test_a_block_routes_as_its_model_does(engine: Any, case: Case) -> dict[str, Any]:
    """Ids and weights as the experts get them, in any order within a row; a pair of weight 0 is no pair."""
    inputs, spec = inputs_of(case), spec_of(case["family"])
    routing = answer(engine, inputs).routing
    if routing is None:
        raise Unsupported("block: the engine cannot tell how it routed")
    choice = Exact(inputs, spec).choice()
    shape = (choice.weights.shape[0], spec.routing.top_k)
    ids = compare.shape_and_type("ids", routing.ids, shape, integer=True).cpu().long()
    weights = compare.shape_and_type("weights", routing.weights, shape, integer=False).cpu()
    experts = choice.weights.shape[1]
    if bool(((ids < 0) | (ids > experts)).any()):
        raise Nonconformance(f"ids: got {int(ids.min())} to {int(ids.max())}, want 0 to {experts - 1}")
    rows = zip(ids.tolist(), weights.tolist(), strict=True)
    names = [sorted(i for i, w in zip(*row, strict=True) if w) for row in rows]
    want = [row.nonzero().flatten().tolist() for row in choice.weights]
    for token, pair in enumerate(zip(names, want, strict=True)):
        compare.same(f"experts of token {token}", *pair)
    compare.close("weights by expert", dense(ids, weights.double(), spec), choice.weights, choice.bound)
    return {"experts of the first tokens": [" ".join(map(str, row)) for row in names[:5]]}
