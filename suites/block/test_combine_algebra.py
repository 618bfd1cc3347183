"""The whole block: routed sum, scale, latent width, shared experts, dense MLP, norms and biases, each in its place."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.block.cases import BLOCK_CASES
from moe_conformance.suites.block.judging import judge_output


@check(BLOCK_CASES)
def test_a_block_computes_what_its_model_does(engine: Any, case: Case) -> None:
    """From router input to block output, of a family's own config and weights."""
    judge_output(engine, case)
