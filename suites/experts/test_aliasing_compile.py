"""Experts leave their inputs alone, and hand out memory that is nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.memory import assert_own, assert_unchanged
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.experts.cases import OWN_MEMORY_CASES, UNCHANGED_CASES
from moe_conformance.suites.experts.inputs import inputs_of


@check(UNCHANGED_CASES)
@torch.no_grad()
def test_inputs_are_left_as_they_were(engine: Any, case: Case) -> None:
    """Each tensor of the call has its bytes afterwards, and after a second call."""
    inputs = to_device(inputs_of(case), engine.info.device)
    assert_unchanged("experts", engine.experts, inputs)


@check(OWN_MEMORY_CASES)
@torch.no_grad()
def test_what_is_returned_is_the_callers(engine: Any, case: Case) -> None:
    """The answer shares no memory with inputs, and keeps its values when the next is computed."""
    inputs = to_device(inputs_of(case), engine.info.device)
    assert_own("experts", engine.experts, inputs, replace(inputs, x=inputs.x.flip(0) * 3))
