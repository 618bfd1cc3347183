"""Every element of a layer's output is written, whatever was in the memory that it lies in."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.suites.layer.cases import WRITTEN_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import answer


@check(WRITTEN_CASES)
@torch.no_grad()
def test_every_element_is_written(engine: Any, case: Case) -> None:
    """Fresh memory is NaN, and no input is: neither is any element of the answer."""
    compare.written("layer output", answer(engine, inputs_of(case)))
