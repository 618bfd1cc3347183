"""The experts alone, with a routing that the case gives: activation, clamps, biases, layout, whatever computes them."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.block.cases import EXPERTS_CASES
from moe_conformance.suites.block.judging import judge_output


@check(EXPERTS_CASES)
def test_experts_compute_their_own_function(engine: Any, case: Case) -> None:
    """Each chosen expert's MLP of each token, at the weights given; in some cases all tokens go to the same experts."""
    judge_output(engine, case)
