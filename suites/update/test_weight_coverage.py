"""A push of some tensors changes those, and leaves the others."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.update.cases import PARTS_CASES
from moe_conformance.suites.update.inputs import judge


@check(PARTS_CASES)
@torch.no_grad()
def test_a_push_changes_what_it_holds_and_nothing_else(engine: Any, case: Case) -> None:
    """Experts without router, router without experts, one matrix, or all of it in several calls."""
    judge(engine, case)
