"""`align`: pairs of token and expert sorted by expert, each expert's into whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AlignInputs:
    """Pairs to be sorted by expert, each expert's into whole blocks.

    ids: [T, K] int32 or int64, not always contiguous: an expert in [0, experts), or -1 for a dropped pair; the ids of a
    row are distinct apart from -1. experts: E. block: slots a block has.
    expert_map: [E] int32, this rank's local id of each expert, in any order, or -1 where another rank has it; None:
    local ids are global ids.
    """

    ids: Tensor
    experts: int
    block: int
    expert_map: Tensor | None = None


class Aligned(NamedTuple):
    """Which pair each slot holds. Slots come in blocks, and all pairs of a block have the same expert.

    slot_to_pair (sorted_token_ids): [P] int32, pair t K + k; T K marks padding.
    expert_of_block (expert_ids): [P / block] int32, the local expert of each block, -1 for trailing unused blocks.
    padded_count (num_tokens_post_padded): [1] int32, slots in use, a multiple of block; the slots after them hold T K.
    P follows from shapes alone. Pairs routed to experts on other ranks are omitted.

    An engine may
    - return more slots, and leave anything in the unused ones;
    - mark padding by any number from T K up but the dtype's largest, which fresh memory holds while cases run;
    - put experts, and the pairs of one expert, in any order;
    - give pairs of other ranks slots in blocks of expert -1, which then count as absent (vLLM does so by default);
    - give the count as a 0-d tensor or an int.
    """

    slot_to_pair: Tensor
    expert_of_block: Tensor
    padded_count: Tensor
