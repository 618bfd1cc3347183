"""A token's routing has the same bits whichever tokens are beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Routing
from moe_conformance.judging import compare
from moe_conformance.suites.batches import BATCHES
from moe_conformance.suites.route.cases import INVARIANT_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed
from moe_conformance.suites.route.test_token_padding import by_expert


@check(INVARIANT_CASES)
def test_rows_keep_their_bits_in_any_batch(engine: Any, case: Case) -> None:
    """The first token alone, half of the batch, the batch the other way round: bits are those of the whole batch."""
    inputs = inputs_of(case)
    whole = routed(engine, "route", inputs)
    for name, rows in BATCHES.items():
        index = rows(case["tokens"])
        want = by_expert(Routing(whole.ids[index], whole.weights[index]))
        got = by_expert(routed(engine, f"route of {name}", replace(inputs, logits=inputs.logits[index])))
        compare.equal(f"ids of {name}, against those rows of the batch", got.ids, want.ids)
        compare.equal(f"weights of {name}, against those rows of the batch", got.weights, want.weights)
