"""Which rank holds which expert: global to local ids, uneven division, and several copies of one expert.

An id of -1 names no expert and is passed through by every function here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_conformance.engine import Replicated, ReplicateInputs
from moe_conformance.errors import InputError


def even_split(total: int, parts: int) -> list[int]:
    """Sizes that differ by at most one, the larger first: 11 in 3 parts is [4, 4, 3]. The rule of vllm#21497."""
    size, more = divmod(total, parts)
    return [size + (part < more) for part in range(parts)]


def expert_map(
    experts: int, rank: int, ranks: int, placement: Literal["contiguous", "round_robin"] = "contiguous"
) -> Tensor:
    """[E] int32: the local id of each expert that this rank holds, -1 for those of other ranks.

    Five experts on two ranks, seen from rank 1: contiguous [-1, -1, -1, 0, 1], round robin [-1, 0, -1, 1, -1].
    """
    ids = torch.arange(experts, dtype=torch.int32)
    if placement == "round_robin":
        return torch.where(ids % ranks == rank, ids // ranks, -1)
    sizes = even_split(experts, ranks)
    local = ids - sum(sizes[:rank])
    return torch.where((local >= 0) & (local < sizes[rank]), local, -1)


def held_experts(expert_map: Tensor) -> Tensor:
    """Global id of each local expert, [n] int64. Raises InputError unless local ids are 0 to n - 1, each once."""
    held = (expert_map >= 0).nonzero().flatten()
    local, order = expert_map[held].sort()
    if not torch.equal(local, torch.arange(len(held), dtype=local.dtype, device=local.device)):
        raise InputError(f"expert_map: got local ids {local.tolist()}, want each of 0 to {len(held) - 1} once")
    return held[order]


def local_ids(ids: Tensor, expert_map: Tensor) -> Tensor:
    """Local ids of this rank's experts; -1 for another rank's expert and for -1.

    ids: [T, K] integer, -1 or in [0, E), else InputError. expert_map: [E]. returns [T, K] int64 in [-1, n).
    """
    _check_ids(ids, len(expert_map))
    # One further entry, which an id of -1 indexes.
    local = torch.cat([expert_map, expert_map.new_tensor([-1])])
    return local[ids].long()


def physical_ids(ids: Tensor, physical_to_logical: Tensor, experts: int) -> Tensor:
    """The copy of its expert that each pair goes to: row t of the batch takes copy t modulo the number of copies.

    The rule depends on the row only, so that all ranks that see the batch agree. ids: [T, K] logical, -1 or in [0, E).
    physical_to_logical: [P], the expert that each physical one is a copy of. returns [T, K] int64 in [0, P), or -1.
    Raises InputError for an id out of range and for an expert without a copy.
    With copies [0, 1, 0], expert 0's pairs in rows 0, 1, 2 go to 0, 2, 0.
    """
    _check_ids(ids, experts)
    copies = physical_to_logical.bincount(minlength=experts)
    if len(copies) > experts or not copies.all():
        raise InputError(
            f"physical_to_logical: got {physical_to_logical.tolist()}, want every expert of 0 to {experts - 1}"
        )
    by_expert = physical_to_logical.argsort(stable=True)  # [P], the copies of expert 0, then of expert 1, ...
    first = copies.cumsum(0) - copies
    row = torch.arange(len(ids), device=ids.device)[:, None]
    # An id of -1 finds the last expert's copy; it is replaced by -1 below.
    return torch.where(ids < 0, -1, by_expert[first[ids] + row % copies[ids]])


def expert_load(ids: Tensor, experts: int, tokens: int) -> Tensor:
    """How many pairs of the first `tokens` rows name each logical expert; further rows are padding. [E] int64."""
    real = ids[:tokens]
    return real[real >= 0].bincount(minlength=experts)


def replicate(inputs: ReplicateInputs) -> Replicated:
    """The physical ids of a batch, and its load."""
    ids = physical_ids(inputs.ids, inputs.physical_to_logical, inputs.experts)
    return Replicated(ids, expert_load(inputs.ids, inputs.experts, inputs.tokens))


def _check_ids(ids: Tensor, experts: int) -> None:
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < experts:
        raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, want -1 or 0 to {experts - 1}")
