"""What belongs to a layer is computed around stored experts as around plain ones."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.layer.cases import STORED_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import assert_output


@check(STORED_CASES)
@torch.no_grad()
def test_a_layer_is_whole_around_stored_experts(engine: Any, case: Case) -> None:
    """Limits, biases, zero points, latent projections, shared experts and scale, each as with plain weights."""
    assert_output(engine, inputs_of(case))
