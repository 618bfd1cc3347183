"""Blocks read x as it is given, or refuse it."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.block.cases import ARGUMENT_CASES
from moe_conformance.suites.block.judging import judge_output


@check(ARGUMENT_CASES)
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """The output is that of the values, wherever in memory they lie."""
    assert_honoured("block", case["arguments"], lambda given: judge_output(engine, case, given))
