"""Ids of pairs are read with the strides that they have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.align.cases import ARGUMENTS
from moe_conformance.suites.align.test_permutation import assert_placed


@check(ARGUMENTS)
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """Each pair stands once in a block of its expert, wherever in memory its id lies."""

    def judge(given: Any) -> None:
        usual = replace(case, recipe={**case.recipe, "layout": "contiguous"})
        assert_placed(engine, case if given else usual)

    assert_honoured("align", {"ids": f"with {case['layout']}"}, judge)
