"""Expert outputs are weighed, summed and scaled once each, for any number of tokens, experts and pairs."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.experts.cases import SUM_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import assert_sum


@check(SUM_CASES)
@torch.no_grad()
def test_outputs_are_weighed_and_summed(engine: Any, case: Case) -> None:
    """Weights of both signs that do not sum to 1, a scale, identity experts."""
    assert_sum(engine, inputs_of(case))
