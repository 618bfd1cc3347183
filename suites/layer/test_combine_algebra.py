"""Routed sum, scale, latent projections, shared experts: each part of a layer in its place, once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.layer.cases import STORED_CASES, SUM_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import assert_output


@check(SUM_CASES)
@torch.no_grad()
def test_each_part_of_a_layer_counts_once(engine: Any, case: Case) -> dict[str, Any]:
    """The output of a layer without padding is the exact one; every fresh allocation is poisoned."""
    got = assert_output(engine, inputs_of(case))
    return {"shape": list(got.shape), "dtype": str(got.dtype)}


@check(STORED_CASES)
@torch.no_grad()
def test_a_layer_is_the_same_around_stored_experts(engine: Any, case: Case) -> None:
    """The output is the exact one of the numbers that are stored, as it is of plain experts."""
    plain = replace(case, recipe={word: value for word, value in case.recipe.items() if word != "quant"})

    def judge(stored: bool) -> None:
        assert_output(engine, inputs_of(case if stored else plain))

    assert_holds("layer", f"experts stored as {case['quant'].format}", judge)
