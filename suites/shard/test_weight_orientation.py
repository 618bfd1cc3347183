"""Ranks cut matrices along the dim that is declared, whatever dims coincide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.shard.cases import ORIENTED, TINY
from moe_conformance.suites.shard.ranks import judge_sum, ranks, unsharded


@check(ORIENTED)
@torch.no_grad()
def test_no_shape_decides_a_layout(engine: Any, case: Case) -> None:
    """Parts sum to the layer, as they do where no two dims are equal."""
    width = replace(case["mlp"], width=TINY["F"])
    usual = replace(case, recipe={**case.recipe, "D": TINY["D"], "F": TINY["F"], "mlp": width})

    def judge(special: bool) -> None:
        layer = unsharded(case if special else usual)
        judge_sum(engine, "sum of the ranks' parts", layer, ranks(case, layer))

    assert_holds("shard", f"D = {case['D']}, F = {case['F']}, E = {case['E']}", judge)
