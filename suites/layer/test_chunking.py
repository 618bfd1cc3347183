"""A token's output is its own, however many tokens there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.layer.cases import CHUNK_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import assert_output

# Fewer than any chunk has.
FEW = 16


@check(CHUNK_CASES)
@torch.no_grad()
def test_any_number_of_tokens_is_computed(engine: Any, case: Case) -> None:
    """The output is the exact one, as it is of the first few tokens."""
    inputs = inputs_of(case)
    token_ids = None if inputs.token_ids is None else inputs.token_ids[:FEW]
    few = replace(inputs, x=inputs.x[:FEW], logits=inputs.logits[:FEW], token_ids=token_ids)

    def judge(many: bool) -> None:
        assert_output(engine, inputs if many else few)

    assert_holds("layer", f"{case['tokens']} tokens", judge)
