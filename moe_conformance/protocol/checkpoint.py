"""Checkpoints: what `remap` is given, and what it says of each tensor; what `load` gives of stored experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from moe_conformance.model.storage import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CheckpointName:
    """A tensor of a checkpoint: its name and shape."""

    name: str
    shape: tuple[int, ...] = field(default=())


class Target(NamedTuple):
    """A place in a parameter that holds several checkpoint tensors.

    parameter: its name. expert: which of its experts, None where it holds one or the tensor fills all. shard: which
    part of an expert, in the engine's own words ("w1", 0, ...), None where the tensor fills it.
    """

    parameter: str
    expert: int | None = None
    shard: str | int | None = None


class Loaded(dict[str, "Tensor"]):
    """Tensors by canonical name, and how experts lie in memory that a checkpoint has quantised.

    stored: by what precedes a layer's names ("layers.0."), a QuantSpec without activations and the tensors of
    `QuantSpec.tensors("experts", ...)` but for biases, which mean the same numbers. Layers whose matrices are not all
    in one form that a QuantSpec says have none. An engine that gives a plain dict is judged by its numbers alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, tuple[QuantSpec, dict[str, Tensor]]] = {}
