"""The routed experts that come with a request are those of its own tokens."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.suites.generate.cases import PLACES, ROUTED
from moe_conformance.suites.generate.served import misplaced, served, wrong_routes, wrong_tokens


@check(ROUTED)
def test_every_token_comes_with_its_own_experts(engine: Engine, case: Case) -> None:
    """Of each position but the last, in every layer that has experts; whose tokens are wrong is judged elsewhere."""
    model, answer = served(engine, case)
    if wrong := list(wrong_tokens(model, answer)):
        raise Unsupported(f"the tokens are others, so are their experts: {wrong[0]}")
    wrong = list(wrong_routes(model, answer))
    if wrong:
        raise Nonconformance("\n".join(wrong))


@check(PLACES)
def test_rows_stand_in_their_places_in_a_narrow_dtype(engine: Engine, case: Case) -> None:
    """Not shifted, stale or another request's: of each prompt most rows are those of the model in float32."""
    wrong = list(misplaced(*served(engine, case)))
    if wrong:
        raise Nonconformance("\n".join(wrong))
