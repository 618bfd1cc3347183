"""Filling a block's modules with the canonical tensors of its layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engines.transformers.block_families import (
    OWN_LAYOUTS,
    PREFIXES,
    SEPARATE,
    SOURCES,
    UNGATED,
    Source,
)
from moe_conformance.errors import InputError, Unsupported


class _Read(dict[str, Tensor]):
    """Tensors that remember which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise InputError(f"{name}: got no such tensor; the block has a parameter of it")
        self.read.add(name)
        return super().__getitem__(name)


def fill(
    found: Any, tensors: Mapping[str, Tensor], rest: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Fill the parameters of a `block.Block` from the canonical tensors.

    rest: dtype of zeros for parameters without a canonical tensor; None: there must be no such parameter.
    """
    remembered = _Read(tensors)
    state = {}
    for name, parameter in found.root.state_dict().items():
        try:
            value = source(found.moe, name)(remembered, found.moe)
        except InputError:
            if rest is None:
                raise
            kind = rest if parameter.is_floating_point() else parameter.dtype
            value = torch.zeros(parameter.shape, dtype=kind, device=device)
        if value.shape != parameter.shape:
            raise InputError(
                f"{name}: got {list(value.shape)} from the canonical tensors, want {list(parameter.shape)}"
            )
        if value.is_floating_point() and found.stays_in_float32(name):
            value = value.float()
        state[name] = value
    found.root.load_state_dict(state, assign=True)
    unused = tensors.keys() - remembered.read
    unfilled = [name for name, tensor in _tensors(found.root) if tensor.is_meta]
    if unused or unfilled:
        raise InputError(f"{type(found.moe).__name__}: tensors not used: {sorted(unused)}; not filled: {unfilled}")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def source(moe: Any, name: str) -> Source:
    """The source of the block's parameter of this name. Raises Unsupported if it is not known."""
    name = name.removeprefix("layer.")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    own = OWN_LAYOUTS.get(type(getattr(moe, "experts", None)).__name__, {})
    shared = getattr(moe, name.partition(".")[0], None)
    ungated = UNGATED if isinstance(shared, nn.Module) and not hasattr(shared, "gate_proj") else {}
    if found := own.get(name) or ungated.get(name) or SOURCES.get(name):
        return found
    if match := re.fullmatch(r"experts\.expert_(\d+)\.(.+)", name):
        number = int(match[1])
        return Source(SEPARATE[match[2]], lambda tensor, _: tensor[number])
    raise Unsupported(f"block: no canonical tensor is known for {name} of {type(moe).__name__}")


def is_made(moe: Any, name: str) -> bool:
    """Whether a parameter comes from a canonical tensor, rather than belonging to another part of the layer."""
    try:
        source(moe, name)
    except Unsupported:
        return False
    return True


def canonical(moe: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The canonical tensors behind the parameters of a block."""
    whole: dict[str, Tensor] = {}
    halves: dict[str, dict[int, Tensor]] = {}
    experts: dict[str, list[Tensor]] = {}
    dims: dict[str, int] = {}
    for name, parameter in parameters.items():
        made_of = source(moe, name)
        if re.search(r"experts\.expert_\d+\.", name):  # in the order of their numbers
            experts.setdefault(made_of.name, []).append(parameter)
        elif made_of.half is None:
            whole[made_of.name] = made_of.back(parameter, moe)
        else:
            halves.setdefault(made_of.name, {})[made_of.half] = made_of.back(parameter, moe)
            dims[made_of.name] = made_of.dim
    found = {name: torch.stack(rows) for name, rows in experts.items()}
    found |= {name: torch.cat([both[0], both[1]], dims[name]) for name, both in halves.items()}
    return whole | found
