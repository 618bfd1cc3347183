"""Experts read x, ids, weights and matrices as they are given, or refuse them."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.experts.cases import ARGUMENT_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum


@check(ARGUMENT_CASES)
@torch.no_grad()
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """The sum is the exact one; where it is not, the first argument to blame is named."""
    assert_honoured("experts", case["arguments"], lambda given: assert_sum(engine, inputs_of(case, given)))
