"""From a layer case to its inputs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import LayerInputs
from moe_conformance.judging.inputs import distinct_logits, matrix, normal
from moe_conformance.judging.layouts import given_as


def inputs_of(case: Case, given: Collection[str] | None = None) -> LayerInputs:
    """The case's inputs on the CPU. given: as for experts (suites/experts/inputs.py)."""
    dtype, spec = getattr(torch, case["dtype"]), case["spec"]
    as_given = partial(given_as, case.recipe.get("arguments", {}), given)
    return LayerInputs(
        x=as_given("x", normal((case["tokens"], spec.hidden_size), "layer-x", dtype)),
        logits=as_given("logits", distinct_logits(case["tokens"], spec.classes, "layer-logits")),
        spec=spec,
        tensors={
            name: as_given("tensors", tensor(name, shape, dtype))
            for name, shape in spec.tensors().items()
            if name != "router.proj"
        },
        padded_hidden=case["padded_hidden"],
        padded_intermediate=case["padded_intermediate"],
    )


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seed, part = f"layer-{name.removeprefix('experts.').replace('.', '-')}", name.rpartition(".")[2]
    if name == "router.per_expert_scale":
        return normal(shape, "layer-expert-scale") + 1.5
    if name.startswith("router."):
        return normal(shape, seed, std=0.25)
    if part.startswith("b") or part.endswith("_bias"):
        return normal(shape, seed, dtype, 0.5)
    if part in ("norm", "output_norm"):  # added to 1 by the layer
        return normal(shape, seed, dtype, 0.25)
    return matrix(shape, seed, dtype)
