"""Checkpoints: what `remap` is given."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointName:
    """A tensor of a checkpoint: its name and shape."""

    name: str
    shape: tuple[int, ...] = field(default=())
