"""Dispatch leaves ids and maps alone, and hands out memory that is nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.memory import assert_own, assert_unchanged
from moe_conformance.suites.align.cases import OWN_MEMORY, UNCHANGED
from moe_conformance.suites.align.test_permutation import inputs_of


@check(UNCHANGED)
def test_inputs_are_left_as_they_were(engine: Any, case: Case) -> None:
    """Ids and map have their bytes afterwards, and after a second call."""
    assert_unchanged("align", engine.align, inputs_of(case, engine))


@check(OWN_MEMORY)
def test_what_is_returned_is_the_callers(engine: Any, case: Case) -> None:
    """The answer shares no memory with ids, and keeps its values when the next is computed."""
    inputs = inputs_of(case, engine)
    assert_own("align", engine.align, inputs, replace(inputs, ids=inputs.ids.flip(0)))
