"""Dispatch: pairs sorted by expert, each expert in blocks of its own. Twin of reference_impl/dispatch.py.

A stable counting sort without atomics, so it gives the same bits every run. Programs cannot wait for each other: with
few pairs, each program counts all of them in one launch; with many, two launches count first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import Aligned
from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted, local_expert, require_device
from moe_conformance.reference_impl.dispatch import slot_count
from moe_conformance.reference_impl.operators import operator

# Pairs that every program counts for itself: 32 a thread at 4 warps.
_ONE_LAUNCH = 4096
# Elements of a tile that a program fills at a time: 64 a thread at 4 warps.
_SLICE = 8192
# Pairs that one program places, comparing each with each; few where programs are few, that more of them share the work.
MOST_PAIRS = {"one launch": 64, "counted": 128, "interpreted": 256}


# Not specialised on the number of tokens: one compilation serves all.
@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    ids_ptr, map_ptr, counts_ptr, pairs, experts, HAS_MAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts[chunk, e]: how many of the chunk's BLOCK_R pairs go to expert e."""
    chunk = tl.program_id(0)
    pair = chunk.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = local_expert(ids_ptr, pair, pair < pairs, map_ptr, experts, HAS_MAP)
    counts = tl.histogram(tl.maximum(expert, 0), BLOCK_E, mask=expert >= 0)
    offs_e = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + chunk.to(tl.int64) * experts + offs_e, counts, mask=offs_e < experts)


@triton.jit(do_not_specialize=["chunks"])
def sum_kernel(counts_ptr, totals_ptr, chunks, experts, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    """totals[e], and counts[chunk, e] made those of all earlier chunks."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        ptr = counts_ptr + offs_c.to(tl.int64)[:, None] * experts + offs_e[None, :]
        mask = (offs_c[:, None] < chunks) & (offs_e[None, :] < experts)
        counts = tl.load(ptr, mask=mask, other=0)
        tl.store(ptr, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + offs_e, total, mask=offs_e < experts)


@triton.jit(do_not_specialize=["pairs", "slots"])
def align_kernel(
    ids_ptr,
    map_ptr,
    before_ptr,
    totals_ptr,
    slot_to_pair_ptr,
    expert_of_block_ptr,
    padded_count_ptr,
    pairs,
    experts,
    slots,
    HAS_MAP: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FILL_E: tl.constexpr,
    FILL_B: tl.constexpr,
    FILL_S: tl.constexpr,
    SLICE_E: tl.constexpr,
    SLICE_B: tl.constexpr,
):
    """Each program places its BLOCK_R pairs, and fills a share of the slots and blocks without pairs.

    FILL_E experts, FILL_B blocks, FILL_S slots: a program's shares. SLICE_E, SLICE_B: what it holds of them at a time.
    """
    program = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    own_r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    if COUNTED:
        totals = tl.load(totals_ptr + offs_e, mask=offs_e < experts, other=0)
        before = tl.load(before_ptr + program.to(tl.int64) * experts + offs_e, mask=offs_e < experts, other=0)
    else:
        all_r = tl.arange(0, ALL_R)
        expert = local_expert(ids_ptr, all_r, all_r < pairs, map_ptr, experts, HAS_MAP)
        kept = expert >= 0
        expert = tl.maximum(expert, 0)
        totals = tl.histogram(expert, BLOCK_E, mask=kept)
        before = tl.histogram(expert, BLOCK_E, mask=kept & (all_r < program * BLOCK_R))
    padded = (totals + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded  # [BLOCK_E]
    padded_count = tl.sum(padded, axis=0)

    # A pair's slot: its expert's first, and one further for each earlier pair of that expert.
    own = local_expert(ids_ptr, own_r, own_r < pairs, map_ptr, experts, HAS_MAP)
    other_r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    other = local_expert(ids_ptr, other_r, other_r < pairs, map_ptr, experts, HAS_MAP)
    earlier = (own[:, None] == other[None, :]) & (other_r[None, :] < own_r[:, None])  # [BLOCK_R, BLOCK_R]
    slot = tl.gather(starts + before, tl.maximum(own, 0), 0) + tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(slot_to_pair_ptr + slot, own_r, mask=own >= 0)

    # Slots between an expert's last pair and the end of its blocks, and those after all experts.
    for first in range(0, FILL_E, SLICE_E):
        fill_e = program * FILL_E + first + tl.arange(0, SLICE_E)
        inside = tl.minimum(fill_e, BLOCK_E - 1)
        fill = tl.gather(starts + totals, inside, 0)[:, None] + tl.arange(0, BLOCK)[None, :]
        mask = (fill_e[:, None] < experts) & (fill < tl.gather(ends, inside, 0)[:, None])
        tl.store(slot_to_pair_ptr + fill, pairs + tl.zeros_like(fill), mask=mask)
    fill_s = program * FILL_S + tl.arange(0, FILL_S)
    tl.store(slot_to_pair_ptr + fill_s, pairs + tl.zeros_like(fill_s), mask=(fill_s >= padded_count) & (fill_s < slots))

    # A block's expert is the number of experts that end before it.
    for first in range(0, FILL_B, SLICE_B):
        fill_b = program * FILL_B + first + tl.arange(0, SLICE_B)
        expert_of_block = tl.sum((ends[None, :] <= fill_b[:, None] * BLOCK).to(tl.int32), axis=1)
        expert_of_block = tl.where(fill_b * BLOCK < padded_count, expert_of_block, -1)
        tl.store(expert_of_block_ptr + fill_b, expert_of_block, mask=fill_b < slots // BLOCK)
    if program == 0:
        tl.store(padded_count_ptr, padded_count)


def align_blocks(pairs: int, experts: int, slots: int, block: int, interpret: bool) -> dict[str, int]:
    """Tile sizes; BLOCK_R is of count_kernel too. Programs as they fit, each with an even share of what is filled."""
    power, counted = triton.next_power_of_2, pairs > _ONE_LAUNCH
    block_r = min(power(pairs), MOST_PAIRS["interpreted" if interpret else "counted" if counted else "one launch"])
    programs = triton.cdiv(pairs, block_r)
    fill_e, fill_b = power(triton.cdiv(experts, programs)), power(triton.cdiv(slots // block, programs))
    return {
        "ALL_R": 1 if counted else power(pairs),
        "BLOCK_R": block_r,
        "BLOCK_E": power(experts),
        "FILL_E": fill_e,
        "FILL_B": fill_b,
        "FILL_S": power(triton.cdiv(slots, programs)),
        "SLICE_E": max(1, min(fill_e, _SLICE // block)),
        "SLICE_B": max(1, min(fill_b, _SLICE // power(experts))),
    }


def _launch(ids: Tensor, experts: int, block: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    require_device(ids=ids, expert_map=expert_map)
    ids, pairs = ids.contiguous(), ids.numel()
    expert_map = None if expert_map is None else expert_map.contiguous()
    slots = slot_count(pairs, experts, block)

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    aligned = room(slots), room(slots // block), room(1)
    if not slots:
        aligned[2].zero_()
        return aligned
    blocks = align_blocks(pairs, experts, slots, block, interpreted())
    programs = triton.cdiv(pairs, blocks["BLOCK_R"])
    counted, has_map = pairs > _ONE_LAUNCH, expert_map is not None
    before = totals = None
    with torch.cuda.device_of(ids):
        if counted:
            before, totals = room(programs, experts), room(experts)
            sizes = {"BLOCK_R": blocks["BLOCK_R"], "BLOCK_E": blocks["BLOCK_E"]}
            count_kernel[(programs,)](ids, expert_map, before, pairs, experts, HAS_MAP=has_map, **sizes)
            columns = min(blocks["BLOCK_E"], 16)
            sum_kernel[(triton.cdiv(experts, columns),)](
                before, totals, programs, experts, BLOCK_C=128, BLOCK_E=columns
            )
        align_kernel[(programs,)](
            ids,
            expert_map,
            before,
            totals,
            *aligned,
            pairs,
            experts,
            slots,
            HAS_MAP=has_map,
            COUNTED=counted,
            BLOCK=block,
            **blocks,
        )
    return aligned


def _fake(ids: Tensor, experts: int, block: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    slots = slot_count(ids.numel(), experts, block)
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in (slots, slots // block, 1))  # type: ignore[return-value]


_align = operator(
    "align(Tensor ids, int experts, int block, Tensor? expert_map) -> (Tensor, Tensor, Tensor)", _launch, _fake
)


def align(ids: Tensor, experts: int, block: int, expert_map: Tensor | None = None) -> Aligned:
    """Give every expert a whole number of blocks of slots, and each of its pairs one of them.

    ids: [T, K] int32 or int64 of any strides; ids outside [0, experts) are dropped, as are those of other ranks.
    block: a power of two. expert_map: [experts] int32, the local id of each expert here, -1 for the others.
    returns slot_to_pair [P] int32, T K where a slot holds no pair, with P = `slot_count(T K, experts, block)`;
    expert_of_block [P / block] int32, ascending, -1 for trailing unused blocks; padded_count [1] int32. Pairs of one
    expert are in ascending order. Never waits for the device, so it can be recorded in a CUDA graph.
    Raises InputError for shapes and dtypes, and for a block that is no power of two.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids: got {ids.dtype} {list(ids.shape)}, want int32 or int64 [T, K]")
    if block < 1 or block & (block - 1):
        raise InputError(f"block: got {block}, want a power of two, as tiles of kernels are")
    if experts < 1:
        raise InputError(f"experts: got {experts}, want at least 1")
    if expert_map is not None and (expert_map.shape != (experts,) or expert_map.dtype != torch.int32):
        raise InputError(f"expert_map: got {expert_map.dtype} {list(expert_map.shape)}, want int32 [{experts}]")
    return Aligned(*_align(ids, experts, block, expert_map))
