"""Pairs that another rank computes: the id one beyond all experts."""

from __future__ import annotations

from typing import Any

from moe_conformance.case import Case, check
from moe_conformance.suites.families.cases import DROPPED_CASES
from moe_conformance.suites.families.judging import judge_output


@check(DROPPED_CASES)
def test_a_dropped_pair_adds_nothing(engine: Any, case: Case) -> None:
    """A third of the pairs has id E and weight 0: the output is that of the other pairs."""
    judge_output(engine, case)
