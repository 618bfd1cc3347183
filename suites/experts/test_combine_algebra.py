"""Expert outputs are weighed, summed and scaled once each, for any number of tokens, experts and pairs."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.experts.cases import SUM_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_beside_stored, assert_sum
from moe_conformance.suites.experts.stored import STORED_SUM_CASES


@check(SUM_CASES)
@torch.no_grad()
def test_outputs_are_weighed_and_summed(engine: Any, case: Case) -> None:
    """Weights of both signs that do not sum to 1, a scale, identity experts."""
    assert_sum(engine, inputs_of(case))


@check(STORED_SUM_CASES)
@torch.no_grad()
def test_outputs_of_stored_experts_are_weighed_and_summed(engine: Any, case: Case) -> None:
    """With stored weights, too: each format's kernel may scale and weigh in a place of its own."""
    assert_beside_stored(engine, case, "a scale, or weights on the input")
