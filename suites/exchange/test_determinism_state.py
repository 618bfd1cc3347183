"""An exchange depends on its own tokens alone, not on those of exchanges before it."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.exchange.cases import STATE
from moe_conformance.suites.exchange.ranks import judge


@check(STATE)
@torch.no_grad()
def test_exchanges_before_leave_no_trace(engine: Any, case: Case) -> None:
    """Other numbers of tokens, and other tokens: the last exchange is right."""
    judge(engine, case)
