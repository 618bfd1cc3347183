"""Weights pushed into a block of transformers that runs: by load_state_dict, under the names of its modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_conformance.engine import UpdateInputs
from moe_conformance.engines.transformers.block import Block, block_of, choose, model_types
from moe_conformance.engines.transformers.filling import fill, source
from moe_conformance.errors import InputError


def features() -> frozenset[str]:
    return model_types() | {"parts", "other_dtype", "replaced"}


def update(inputs: UpdateInputs, implementation: str) -> list[Tensor]:
    """Outputs before any push, and after each; a trainer of transformers sends what its own modules are called."""
    block = inputs.block
    running = copy.deepcopy(block_of(json.dumps(dict(block.config)), block.layer))
    fill(running, {name: tensor.clone() for name, tensor in block.tensors.items()})
    choose(running.moe, block.implementation, implementation)
    outputs = [_output(running, inputs)]
    for push in inputs.pushes:
        state = _named(running, push)
        for piece in range(inputs.pieces):
            own = dict(list(state.items())[piece :: inputs.pieces])
            report = running.root.load_state_dict(own, strict=False, assign=inputs.replaces)
            if report.unexpected_keys:
                raise InputError(f"{type(running.moe).__name__}: no place for {', '.join(report.unexpected_keys)}")
        outputs.append(_output(running, inputs))
    return outputs


def _output(running: Block, inputs: UpdateInputs) -> Tensor:
    with torch.no_grad():
        output: Tensor = running(inputs.block.x, inputs.block.token_ids, inputs.block.state)
    return output.flatten(0, -2)


def _named(running: Block, push: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a push by the block's own names, in its layouts, in the dtype that they came in."""
    sources = {name: source(running.moe, name) for name in running.root.state_dict()}
    return {name: made_of(push, running.moe).clone() for name, made_of in sources.items() if made_of.name in push}
