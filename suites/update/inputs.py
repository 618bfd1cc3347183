"""From an update case to a block and what is pushed into it, and the judgement of what it computes then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import BlockInputs, UpdateInputs
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal
from moe_conformance.oracle.layer import expected_block
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.block.blocks import tensors_of
from moe_conformance.suites.block.configs import VARIANTS, spec_of

# What a push holds, by the beginning of a tensor's name.
PARTS = {"all": "", "first": "", "experts": "experts.", "router": "router.", "down": "experts.w2"}
KEPT = {"router.selection_bias": torch.float32, "router.table": torch.int64}


def inputs_of(case: Case) -> UpdateInputs:
    """On the CPU. Each push has values of its own, which differ from all before it."""
    family, spec, dtype = VARIANTS[case["family"]], spec_of(case["family"]), getattr(torch, case["dtype"])
    pushed = getattr(torch, case["pushed"] or case["dtype"])

    def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(KEPT.get(name, dtype)) for name, tensor in tensors.items()}

    start = tensors_of(case["family"])
    pushes = []
    for number, part in enumerate(case["pushes"]):
        values = start if part == "first" else tensors_of(case["family"], f"-push-{number}")
        if pushed.itemsize > dtype.itemsize and part != "first":
            values = {name: _with_all_bits(name, value) for name, value in values.items()}
        pushes.append({name: t for name, t in cast(values, pushed).items() if name.startswith(PARTS[part])})
    block = BlockInputs(
        config=dict(family.config),
        layer=family.block.layer,
        tensors=cast(start, dtype),
        x=normal((1, case["tokens"], spec.hidden_size), "update-x", dtype),
    )
    return UpdateInputs(block, tuple(pushes), case["pieces"], case["replaces"])


def _with_all_bits(name: str, tensor: Tensor) -> Tensor:
    """A little more than values that are exact in two bytes: whoever holds those rounds them."""
    return tensor if name in KEPT else tensor * (1 + 2.0**-10)


def judge(engine: Any, case: Case) -> None:
    """After each push the output is that of a block which never had other tensors.

    Raises Unsupported where it is wrong before any: then the block is, which is another stage's matter.
    """
    inputs = inputs_of(case)
    outputs = list(engine.update(to_device(inputs, engine.info.device)))
    compare.same("outputs, one before any push and one after each", len(outputs), len(inputs.pushes) + 1)
    block, spec = inputs.block, spec_of(case["family"])
    for number, output in enumerate(outputs):
        if number:
            held = {name: t.to(block.tensors[name].dtype) for name, t in inputs.pushes[number - 1].items()}
            block = replace(block, tensors={**block.tensors, **held})
        want, bound = expected_block(block, spec)
        what = f"output after push {number} of {len(inputs.pushes)} ({case['pushes'][number - 1]})"
        try:
            compare.close(what, output, want, bound)
            compare.same(f"{what}, dtype", str(output.dtype), str(inputs.block.x.dtype))
        except Nonconformance as error:
            if number:
                raise
            raise Unsupported("the block's output is wrong before any push, as the stage block tells") from error
