"""`update`: weights that a trainer pushes into a block that runs, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_conformance.protocol.layer import BlockInputs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UpdateInputs:
    """A block that has been built, filled and run, and what is pushed into it then.

    block: as for `block`, with the tensors that it starts with; its router routes. pushes: in order, each canonical
    name -> new value, of all tensors or of some, in the block's dtype or in another, to which the block's own is kept.
    The adapter names and lays them out as a trainer would send them to its engine. pieces: the number of calls that a
    push comes in. replaces: tensors take the place of those that are there, as `load_state_dict(assign=True)` has it;
    otherwise values are written into those.
    """

    block: BlockInputs
    pushes: tuple[Mapping[str, Tensor], ...]
    pieces: int = 1
    replaces: bool = False
