"""Dispatch: pairs sorted by expert, each expert's pairs padded to whole blocks, so that a tile has one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.engine import Aligned
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.padding import round_up
from moe_conformance.reference_impl.parallel.expert_map import held_experts, local_ids


def align(ids: Tensor, experts: int, block: int, expert_map: Tensor | None = None) -> Aligned:
    """Give every expert a whole number of blocks of slots, and every pair that it takes one of them.

    Experts ascend, and so do the pairs of each; an expert without pairs has no block.
    ids: [T, K] int32 or int64, in [0, experts), or -1 for a pair that no expert takes.
    expert_map: [E] integer, this rank's local id of each expert, -1 for those of other ranks; None: it has all of them.
    Raises InputError for an id out of range and for any other shape, dtype or block.
    Source: vLLM's moe_align_block_size, which guarantees neither the order of an expert's pairs nor the number of
    slots.

    One pair more than a block of expert 0, none of 1, a block of 2, and two blocks that these shapes may need; 6 marks
    padding:

        align(torch.tensor([[0, 2], [-1, 0], [2, 0]]), experts=3, block=2)
        slot_to_pair [0, 3, 5, 6, 1, 4, 6, 6, 6, 6], expert_of_block [0, 0, 2, -1, -1], padded_count [6]
    """
    expert_map = _checked(ids, experts, block, expert_map)
    local, held = local_ids(ids, expert_map).flatten(), len(held_experts(expert_map))  # [T K]
    pairs, device = local.numel(), local.device
    local = local.where(local >= 0, held)  # those without an expert here sort behind all others

    counts = local.bincount(minlength=held + 1)[:held]
    blocks = -(-counts // block)
    first_pair, first_block = counts.cumsum(0) - counts, blocks.cumsum(0) - blocks

    kept = local.argsort(stable=True)[: counts.sum()]
    expert = local[kept]
    slot = first_block[expert] * block + torch.arange(len(kept), device=device) - first_pair[expert]
    slot_to_pair = torch.full((slot_count(pairs, experts, block),), pairs, dtype=torch.int32, device=device)
    slot_to_pair[slot] = kept.int()

    used = torch.arange(held, dtype=torch.int32, device=device).repeat_interleave(blocks)
    expert_of_block = torch.full((len(slot_to_pair) // block,), -1, dtype=torch.int32, device=device)
    expert_of_block[: len(used)] = used
    return Aligned(slot_to_pair, expert_of_block, (blocks.sum()[None] * block).int())


def slot_count(pairs: int, experts: int, block: int) -> int:
    """P of `align`, enough for any ids: min(E, pairs) experts may have pairs, each with block - 1 slots of padding."""
    slots = round_up(pairs + min(experts, pairs) * (block - 1), block)
    most = torch.iinfo(torch.int32).max
    if slots > most:
        raise InputError(f"ids: got {pairs} pairs in blocks of {block}, {slots} slots, want at most {most} (int32)")
    return slots


def _checked(ids: Tensor, experts: int, block: int, expert_map: Tensor | None) -> Tensor:
    """The expert map, by default of all experts. Ids and local ids are checked where they are looked up."""
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids: got {list(ids.shape)} {ids.dtype}, want [T, K] int32 or int64")
    if experts < 1 or block < 1:
        raise InputError(f"got {experts} experts and a block of {block}, want at least 1 of each")
    slot_count(ids.numel(), experts, block)
    if expert_map is None:
        return torch.arange(experts, dtype=torch.int32, device=ids.device)
    if expert_map.shape != (experts,) or expert_map.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"expert_map: got {list(expert_map.shape)} {expert_map.dtype}, want [{experts}] int32 or int64"
        )
    return expert_map
