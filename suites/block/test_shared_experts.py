"""What every token passes: shared experts, a dense MLP, a bias."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.block.cases import SHARED_CASES
from moe_conformance.suites.block.judging import judge_output


@check(SHARED_CASES)
def test_what_is_always_on_is_added_once(engine: Any, case: Case) -> None:
    """With all routing weights 0 the output is the shared part alone."""
    judge_output(engine, case)
