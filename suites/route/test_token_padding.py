"""Rows behind the tokens are padding: what they hold never changes a token's row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Routing
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import relative
from moe_conformance.suites.route.cases import PADDING_CASES
from moe_conformance.suites.route.inputs import inputs_of
from moe_conformance.suites.route.test_routing_semantics import routed


@check(PADDING_CASES)
def test_padding_rows_change_no_token(engine: Any, case: Case) -> None:
    """Tokens keep their bits when the padding holds something else, and their experts when there is none.

    Bits are asked for only between batches of one size: what padding holds must not show, but an engine may choose its
    kernel by the number of rows, and that may sum a row in another order. Then ids are equal and weights within the
    bound of two such sums. Which experts those are is for the checks of the method.
    """
    inputs, tokens = inputs_of(case), case["tokens"]
    first = routed(engine, "route", inputs)
    other = inputs.logits.clone()
    other[tokens:] = inputs.logits[:1].flip(-1)
    second = routed(engine, "route with other padding", replace(inputs, logits=other))
    compare.equal("ids of the tokens, with other padding", second.ids[:tokens], first.ids[:tokens])
    compare.equal("weights of the tokens, with other padding", second.weights[:tokens], first.weights[:tokens])
    token_ids = None if inputs.token_ids is None else inputs.token_ids[:tokens]
    alone = replace(inputs, logits=inputs.logits[:tokens], token_ids=token_ids, valid_rows=None)
    want = by_expert(routed(engine, "route of the tokens alone", alone))
    got = by_expert(Routing(first.ids[:tokens], first.weights[:tokens]))
    compare.equal("ids of the tokens, against the tokens alone", got.ids, want.ids)
    bound = relative(want.weights, 2 * case["experts"], want.weights.dtype, "two sums over all experts")
    compare.close("weights of the tokens, against the tokens alone", got.weights, want.weights, bound)


def by_expert(routing: Routing) -> Routing:
    """Each row in the order of its ids."""
    order = routing.ids.argsort(-1)
    return Routing(routing.ids.gather(-1, order), routing.weights.gather(-1, order))
