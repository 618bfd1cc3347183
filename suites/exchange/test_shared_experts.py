"""A shared expert beside an exchange is added to each token once (sglang#35535)."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.exchange.cases import SHARED
from moe_conformance.suites.exchange.ranks import judge


@check(SHARED)
@torch.no_grad()
def test_shared_output_is_in_each_row_once(engine: Any, case: Case) -> None:
    """Each rank's output is the routed sum of its own tokens plus the shared expert's output for them."""
    judge(engine, case)
