"""Rows and matrices are found where they lie, also beyond what 32 bits count."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.experts.cases import FAR_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum


@check(FAR_CASES)
@torch.no_grad()
def test_elements_beyond_32_bits_are_found(engine: Any, case: Case) -> None:
    """The answer is the exact one, as it is where all lies close together."""

    def judge(given: Any) -> None:
        assert_sum(engine, inputs_of(case, given))

    assert_honoured("experts", case["arguments"], judge)
