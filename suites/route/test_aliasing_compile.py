"""A router leaves its inputs alone, and hands out memory that is nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.memory import assert_own, assert_unchanged
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.route.cases import OWN_MEMORY_CASES, UNCHANGED_CASES
from moe_conformance.suites.route.inputs import inputs_of


@check(UNCHANGED_CASES)
def test_inputs_are_left_as_they_were(engine: Any, case: Case) -> None:
    """Each tensor of the call has its bytes afterwards, and after a second call."""
    assert_unchanged("route", engine.route, to_device(inputs_of(case), engine.info.device))


@check(OWN_MEMORY_CASES)
def test_what_is_returned_is_the_callers(engine: Any, case: Case) -> None:
    """Ids and weights share no memory with logits or with each other, and keep their values in the next call."""
    inputs = to_device(inputs_of(case), engine.info.device)
    assert_own("route", engine.route, inputs, replace(inputs, logits=inputs.logits.flip(0, 1)))
