"""From an experts case to its inputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.judging.inputs import bits, fine, integers, matrix, normal
from moe_conformance.judging.layouts import given_as
from moe_conformance.protocol.experts import ExpertsInputs
from moe_conformance.suites.experts.stored_inputs import adapters, stored_tensors


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    part = name.rpartition(".")[2]
    if part.startswith("b"):
        return fine(shape, name, dtype)
    if "norm" in part:
        return fine(shape, name, dtype, 0.25)
    return matrix(shape, name, dtype)


def chosen(case: Case) -> Tensor:
    """ids [T, K] int64, distinct in a row but for -1; of every five rows the first is whole and the last wholly -1."""
    tokens, top_k, count = case["T"], case["K"], case["E"] + case["identity_experts"]
    ids = bits((tokens, count), "experts-ids").argsort(dim=-1)
    if case["hot"] is not None:
        ids = torch.cat([torch.full((tokens, 1), case["hot"]), ids[ids != case["hot"]].view(tokens, -1)], dim=1)
    ids = ids[:, :top_k].contiguous()
    gone = integers(ids.shape, "experts-dropped", 20) < case["dropped"]
    if 0 < case["dropped"] < 20:
        gone[::5], gone[4::5] = False, True
    return ids.masked_fill(gone, -1)


def expert_map(case: Case) -> Tensor | None:
    """[E] int32 of the case's rank. The first of its experts is its last, which no order of ids explains."""
    if not case["owners"]:
        return None
    held = [expert for expert, owner in enumerate(case["owners"]) if owner == case["rank"]]
    found = torch.full((case["E"],), -1, dtype=torch.int32)
    found[held[1:] + held[:1]] = torch.arange(len(held), dtype=torch.int32)
    return found


def inputs_of(case: Case, given: Collection[str] | None = None) -> ExpertsInputs:
    """The case's inputs on the CPU; tensors of this rank's experts alone.

    given: which of the case's arguments are given as it says, the others contiguous and as the protocol has them; None:
    all. All have the same values either way.
    """
    as_given = partial(given_as, case["arguments"], given)
    dtype, mlp, quant = getattr(torch, case["dtype"]), case["mlp"], case.recipe.get("quant")
    shapes = (quant or mlp).tensors("experts", *([mlp] if quant else []), case["D"], (case["E"],))
    tensors = {name: tensor(name, shape, dtype) for name, shape in shapes.items() if quant is None or ".b" in name}
    if quant is not None:
        tensors |= stored_tensors(quant, mlp, case["D"], case["E"], case.recipe.get("input_scales") == "each")
    lora = adapters(case, dtype) if "lora" in case.recipe else None
    here = expert_map(case)
    if here is not None:
        held = (here >= 0).nonzero().flatten()
        order = held[here[held].argsort()]
        # The output norm is one for all experts.
        tensors = {name: t if name == "experts.output_norm" else t[order] for name, t in tensors.items()}
        if lora is not None:
            lora = replace(lora, tensors={name: t[:, order].contiguous() for name, t in lora.tensors.items()})
    shape = (case["T"], case["K"])
    return ExpertsInputs(
        x=as_given("x", fine((case["T"], case["D"]), "experts-x", dtype)),
        mlp=mlp,
        tensors={name: as_given("tensors", tensor) for name, tensor in tensors.items()},
        ids=as_given("ids", chosen(case)),
        # Of both signs, and a sum of anything but 1.
        weights=as_given("weights", (fine if dtype == torch.float32 else normal)(shape, "experts-weights") + 0.375),
        expert_map=None if here is None else as_given("expert_map", here),
        output_scale=case["output_scale"],
        identity_experts=case["identity_experts"],
        quant=quant,
        lora=lora,
    )


def held_pairs(inputs: ExpertsInputs) -> Tensor:
    """[T, K] bool, the pairs that these inputs compute."""
    held = inputs.ids >= 0
    if inputs.expert_map is not None:
        inside = inputs.ids.clamp(max=inputs.experts - 1)
        held &= (inputs.ids >= inputs.experts) | (inputs.expert_map[inside] >= 0)
    return held
