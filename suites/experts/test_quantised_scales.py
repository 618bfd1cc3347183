"""Stored weights and quantised activations are read with what belongs to them, and with nothing of a neighbour's."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum
from moe_conformance.suites.experts.stored import ACTIVATION_CASES, WEIGHT_CASES


@check(WEIGHT_CASES)
@torch.no_grad()
def test_stored_weights_take_their_own_scales(engine: Any, case: Case) -> None:
    """Scales of neighbouring tiles, groups, rows, halves and experts differ by factors of 2 to 64."""
    assert_sum(engine, inputs_of(case))


@check(ACTIVATION_CASES)
@torch.no_grad()
def test_activations_are_quantised_by_their_own_scales(engine: Any, case: Case) -> None:
    """The sum is that of the rounded activations, but where two codes are about as near."""
    assert_sum(engine, inputs_of(case))
