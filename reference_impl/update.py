"""Weights pushed into a block that runs: written into the tensors that it holds, or put in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from moe_conformance.engine import BlockInputs, BlockOutput, UpdateInputs
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.block import block


class RunningBlock:
    """A block that holds its tensors. inputs: with what it starts with, which it leaves as it is."""

    def __init__(self, inputs: BlockInputs, compute: Callable[[BlockInputs], BlockOutput] = block) -> None:
        self.inputs, self.compute = inputs, compute
        self.tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}

    def push(self, tensors: Mapping[str, Tensor], replaces: bool) -> None:
        """Raises InputError for a name or shape that it does not have, with nothing of the push kept."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise InputError(f"{name}: got no tensor of this name, want one of {', '.join(sorted(self.tensors))}")
            if tensor.shape != (there := self.tensors[name]).shape:
                raise InputError(f"{name}: got {list(tensor.shape)}, want {list(there.shape)}")
        for name, tensor in tensors.items():
            if replaces:
                self.tensors[name] = tensor.to(self.tensors[name].dtype)
            else:
                self.tensors[name].copy_(tensor)

    def output(self) -> Tensor:
        return self.compute(replace(self.inputs, tensors=self.tensors)).output


def update(inputs: UpdateInputs) -> list[Tensor]:
    """Outputs before any push, and after each."""
    running = RunningBlock(inputs.block)
    outputs = [running.output()]
    for push in inputs.pushes:
        for piece in range(inputs.pieces):
            running.push(dict(list(push.items())[piece :: inputs.pieces]), inputs.replaces)
        outputs.append(running.output())
    return outputs
