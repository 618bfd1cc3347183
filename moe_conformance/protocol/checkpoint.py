"""Checkpoints: what `remap` is given, and what it says of each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


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
