"""Matrices of a layer are read as they are declared, whatever dims coincide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.model.specs import LayerSpec
from moe_conformance.suites.layer.cases import ORIENTED_CASES, TINY
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import assert_output


def usual(case: Case) -> Case:
    """The same layer, where no two dims are equal."""
    spec: LayerSpec = case["spec"]
    shared, latent = spec.shared, spec.latent
    spec = replace(
        spec,
        hidden_size=TINY["H"],
        num_experts=TINY["E"],
        experts=replace(spec.experts, width=TINY["F"]),
        shared=replace(shared, mlp=replace(shared.mlp, width=TINY["Fs"])) if shared else None,
        latent=replace(latent, width=TINY["D"]) if latent else None,
    )
    return replace(case, recipe={**case.recipe, "spec": spec, "tokens": TINY["T"]})


@check(ORIENTED_CASES)
@torch.no_grad()
def test_no_shape_decides_a_layout(engine: Any, case: Case) -> None:
    """The output is the exact one, as it is where no two dims are equal."""

    def judge(special: bool) -> None:
        assert_output(engine, inputs_of(case if special else usual(case)))

    assert_holds("layer", "dims that coincide, or narrow experts", judge)
