"""Matrices of experts are read as they are declared, whatever dims coincide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.experts.cases import ORIENTED_CASES, TINY
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum


@check(ORIENTED_CASES)
@torch.no_grad()
def test_no_shape_decides_a_layout(engine: Any, case: Case) -> None:
    """The sum is the exact one, as it is where no two dims are equal and no width is larger than usual."""
    usual = replace(case, recipe={**case.recipe, **TINY, "mlp": replace(case["mlp"], width=TINY["F"])})
    dims = ", ".join(f"{letter} = {case[letter]}" for letter in "TEDF")
    assert_holds("experts", dims, lambda special: assert_sum(engine, inputs_of(case if special else usual)))
