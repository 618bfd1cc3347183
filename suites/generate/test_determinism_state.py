"""A running engine answers each request as the model does without a cache."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Nonconformance
from moe_conformance.suites.generate.cases import TOKENS
from moe_conformance.suites.generate.served import served, wrong_tokens


@check(TOKENS)
def test_every_request_gets_its_models_tokens(engine: Engine, case: Case) -> None:
    """Greedily, in float32; no two tokens are nearly tied."""
    model, answer = served(engine, case)
    wrong = list(wrong_tokens(model, answer))
    if wrong:
        raise Nonconformance("\n".join(wrong))
