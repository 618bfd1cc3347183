"""From a layer case to its inputs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import LayerInputs
from moe_conformance.judging.inputs import bits, distinct_logits, integers, matrix, normal
from moe_conformance.judging.layouts import given_as
from moe_conformance.suites.experts.stored_inputs import stored_tensors


def inputs_of(case: Case, given: Collection[str] | None = None) -> LayerInputs:
    """The case's inputs on the CPU. given: as for experts (suites/experts/inputs.py)."""
    dtype, spec, quant = getattr(torch, case["dtype"]), case["spec"], case.recipe.get("quant")
    as_given = partial(given_as, case.recipe.get("arguments", {}), given)
    stored: dict[str, Tensor] = {}
    if quant is not None:
        width = spec.latent.width if spec.latent else spec.hidden_size
        stored = stored_tensors(quant, spec.experts, width, spec.num_experts)
    table = spec.routing.selector == "table"
    return LayerInputs(
        x=as_given("x", normal((case["tokens"], spec.hidden_size), "layer-x", dtype)),
        logits=as_given("logits", distinct_logits(case["tokens"], spec.classes, "layer-logits")),
        spec=spec,
        tensors={
            name: as_given("tensors", tensor(name, shape, dtype, spec.num_experts))
            for name, shape in spec.tensors().items()
            if name != "router.proj" and name not in stored
        }
        | stored,
        padded_hidden=case["padded_hidden"],
        padded_intermediate=case["padded_intermediate"],
        token_ids=integers((case["tokens"],), "layer-token-ids", spec.vocab_size) if table else None,
        quant=quant,
    )


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, experts: int) -> Tensor:
    seed, part = f"layer-{name.removeprefix('experts.').replace('.', '-')}", name.rpartition(".")[2]
    if name == "router.per_expert_scale":
        return normal(shape, "layer-expert-scale") + 1.5
    if name == "router.table":
        return bits((shape[0], experts), seed).argsort(dim=-1)[:, : shape[1]].contiguous()
    if name.startswith("router."):
        return normal(shape, seed, std=0.25)
    if part.startswith("b") or part.endswith("_bias"):
        return normal(shape, seed, dtype, 0.5)
    if part in ("norm", "output_norm"):  # added to 1 by the layer
        return normal(shape, seed, dtype, 0.25)
    return matrix(shape, seed, dtype)
