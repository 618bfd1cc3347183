"""From a layer case to its inputs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import LayerInputs
from moe_conformance.judging.inputs import bits, distinct_logits, fine, integers, matrix, normal
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
        x=as_given("x", fine((case["tokens"], spec.hidden_size), "layer-x", dtype)),
        logits=as_given("logits", logits_of(case["tokens"], spec.classes, dtype)),
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


def logits_of(tokens: int, classes: int, dtype: torch.dtype) -> Tensor:
    """[T, classes] float32, in the order of `distinct_logits`; beside float32 no copy of two bytes holds them."""
    logits = distinct_logits(tokens, classes, "layer-logits")
    # At most a quarter of the distance between two.
    return logits + fine(logits.shape, "layer-logits-fine", std=2.0**-10) if dtype == torch.float32 else logits


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, experts: int) -> Tensor:
    seed, part = f"layer-{name.removeprefix('experts.').replace('.', '-')}", name.rpartition(".")[2]
    if name == "router.per_expert_scale":
        return normal(shape, "layer-expert-scale") + 1.5
    if name == "router.table":
        return bits((shape[0], experts), seed).argsort(dim=-1)[:, : shape[1]].contiguous()
    if name.startswith("router."):
        return normal(shape, seed, std=0.25)
    if part.startswith("b") or part.endswith("_bias"):
        return fine(shape, seed, dtype, 0.5)
    if part in ("norm", "output_norm"):  # added to 1 by the layer
        return fine(shape, seed, dtype, 0.25)
    return matrix(shape, seed, dtype)
