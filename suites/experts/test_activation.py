"""Experts compute the function that their spec names, whatever the proportions of their matrices."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.experts.cases import FUNCTION_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_beside_stored, assert_sum
from moe_conformance.suites.experts.stored import STORED_FUNCTION_CASES


@check(FUNCTION_CASES)
@torch.no_grad()
def test_experts_compute_their_function(engine: Any, case: Case) -> None:
    """Activation, clamp, gate, biases and norm, each where the spec has it."""
    assert_sum(engine, inputs_of(case))


@check(STORED_FUNCTION_CASES)
@torch.no_grad()
def test_stored_experts_compute_their_function(engine: Any, case: Case) -> None:
    """With stored weights, too: what a kernel of a format is not told shows in that format alone."""
    assert_beside_stored(engine, case, "such a function")
