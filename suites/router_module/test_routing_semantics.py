"""A router with its own projection chooses and weighs by its model's method, in the precision that the model says."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.router_module.cases import ONE_TOKEN_CASES, ROUTER_CASES
from moe_conformance.suites.router_module.routers import RealRouter, judge_router


@check((*ROUTER_CASES, *ONE_TOKEN_CASES))
@torch.no_grad()
def test_a_router_chooses_and_weighs_by_its_method(engine: Any, case: Case) -> None:
    """From hidden states: ids are a best K within the errors of the logits, weights what those ids have."""
    judge_router(engine, RealRouter(case))
