"""Every element of a block's output is written, whatever was in the memory that it lies in."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.suites.block.blocks import inputs_of
from moe_conformance.suites.block.cases import WRITTEN_CASES
from moe_conformance.suites.block.judging import answer


@check(WRITTEN_CASES)
@torch.no_grad()
def test_every_element_is_written(engine: Any, case: Case) -> None:
    """Fresh memory is NaN while the block runs, its parameters are not: neither is any element of the answer."""
    with poisoned_allocations():
        got = answer(engine, inputs_of(case))
    compare.written("block output", got.output)
