"""Ranks with unequal numbers of tokens, and without any (Megatron-LM#1877, vllm#51984)."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.exchange.cases import COUNTS
from moe_conformance.suites.exchange.ranks import judge


@check(COUNTS)
@torch.no_grad()
def test_any_rank_may_have_any_number_of_tokens(engine: Any, case: Case) -> None:
    """A rank without tokens serves those of the others, and gets nothing."""
    judge(engine, case)
