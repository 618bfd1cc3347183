"""The routed sum of a token is its own, however many tokens and pairs there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.experts.cases import CHUNK_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum

# Fewer than any chunk has.
FEW = 16


@check(CHUNK_CASES)
@torch.no_grad()
def test_any_number_of_tokens_is_computed(engine: Any, case: Case) -> None:
    """The sum is the exact one, as it is of the first few tokens."""
    inputs = inputs_of(case)
    few = replace(inputs, x=inputs.x[:FEW], ids=inputs.ids[:FEW], weights=inputs.weights[:FEW])
    assert_holds("experts", f"{case['T']} tokens", lambda many: assert_sum(engine, inputs if many else few))
