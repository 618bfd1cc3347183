"""Every element of every rank's part is written."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.suites.shard.cases import WRITTEN
from moe_conformance.suites.shard.ranks import name_of, part_of, ranks, unsharded


@check(WRITTEN)
@torch.no_grad()
def test_every_element_is_written(engine: Any, case: Case) -> None:
    """Fresh memory is NaN, and no input is: neither is any element of a part."""
    for inputs in ranks(case, unsharded(case)):
        compare.written(name_of(inputs), part_of(engine, inputs))
