"""A block computes with the weights that were pushed last (vllm#42821)."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.update.cases import CURRENT_CASES
from moe_conformance.suites.update.inputs import judge


@check(CURRENT_CASES)
@torch.no_grad()
def test_a_block_computes_with_what_was_pushed_last(engine: Any, case: Case) -> None:
    """Nothing of earlier weights is left: no layout made of them, no copy in another dtype."""
    judge(engine, case)
