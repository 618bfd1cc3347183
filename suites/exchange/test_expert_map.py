"""Each rank gets what its own tokens' experts make of them, wherever these lie (vllm#52639)."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.exchange.cases import NO_EXPERT, OWN
from moe_conformance.suites.exchange.ranks import judge


@check((*OWN, *NO_EXPERT))
@torch.no_grad()
def test_each_rank_gets_its_own_tokens_sums(engine: Any, case: Case) -> None:
    """Experts in runs, scattered or on some ranks alone, all chosen or those of one rank; pairs without an expert."""
    judge(engine, case)
