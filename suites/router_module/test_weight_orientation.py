"""A router's projection is read as it is declared, also where it is square."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.router_module.cases import ORIENTED_CASES
from moe_conformance.suites.router_module.routers import RealRouter, judge_router


@check(ORIENTED_CASES)
@torch.no_grad()
def test_no_shape_decides_a_layout(engine: Any, case: Case) -> None:
    """Ids and weights are those of the method, as they are where there are fewer columns than experts."""
    usual = replace(case, recipe={**case.recipe, "hidden": 72})

    def judge(special: bool) -> None:
        judge_router(engine, RealRouter(case if special else usual))

    assert_holds("router_module", "as many experts as columns", judge)
