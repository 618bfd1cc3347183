"""Recording routed expert ids into a layer's slice of the capture buffer, range-checked without a host sync.

Twin of `capture` in reference_impl/capture.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted, require_device
from moe_conformance.reference_impl.operators import operator

# Ids that one program checks and writes: 32 a thread at 4 warps, so 512 rows of 8. More rows take two launches.
_ONE_PROGRAM = 4096


@triton.jit(do_not_specialize=["start", "count", "layer_id"])
def capture_kernel(
    ids_ptr,
    buffer_ptr,
    rejected_ptr,
    start,
    count,
    layer_id,
    top_k,
    experts,
    stride_ir,
    stride_ik,
    stride_bt,
    stride_bl,
    stride_bk,
    WRITE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Raise rejected[layer] to 1 + the row of an id out of range; with WRITE, copy all ids if it is 0 then."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask = (offs_r[:, None] < count) & (offs_k[None, :] < top_k)
    offs_ids = (offs_r + start)[:, None] * stride_ir + offs_k[None, :] * stride_ik
    ids = tl.load(ids_ptr + offs_ids, mask=mask, other=0)

    bad = mask & ((ids < 0) | (ids >= experts))
    bad_row = tl.max(tl.max(tl.where(bad, offs_r[:, None] + 1, 0), axis=1), axis=0).to(tl.int32)
    earlier = tl.load(rejected_ptr + layer_id)
    tl.atomic_max(rejected_ptr + layer_id, bad_row, mask=bad_row > earlier)
    if WRITE:
        layer_ptr = buffer_ptr + layer_id.to(tl.int64) * stride_bl
        offs_buffer = offs_r[:, None] * stride_bt + offs_k[None, :] * stride_bk
        allowed = tl.where(tl.maximum(earlier, bad_row) == 0, count, 0)  # rows
        mask = mask & (offs_r[:, None] < allowed)
        tl.store(layer_ptr + offs_buffer, ids.to(buffer_ptr.dtype.element_ty), mask=mask)


def capture_blocks(count: int, top_k: int, interpret: bool) -> dict[str, int]:
    """Tile sizes: one program where it holds all ids, otherwise 1024 ids a program."""
    block_k = triton.next_power_of_2(top_k)
    rows = triton.next_power_of_2(count)
    whole = interpret or rows * block_k <= _ONE_PROGRAM
    return {"BLOCK_R": rows if whole else max(1, 1024 // block_k), "BLOCK_K": block_k}


def _launch(ids: Tensor, start: int, count: int, buffer: Tensor, layer_id: int, experts: int, rejected: Tensor) -> None:
    require_device(ids=ids, buffer=buffer, rejected=rejected)
    if not count:
        return
    blocks = capture_blocks(count, ids.shape[1], interpreted())
    programs = triton.cdiv(count, blocks["BLOCK_R"])
    with torch.cuda.device_of(ids):
        # Programs cannot wait for each other, so where there are several, one launch checks before another writes.
        for write in (True,) if programs == 1 else (False, True):
            capture_kernel[(programs,)](
                ids,
                buffer,
                rejected,
                start,
                count,
                layer_id,
                ids.shape[1],
                experts,
                ids.stride(0),
                ids.stride(1),
                *buffer.stride(),
                WRITE=write,
                **blocks,
            )


_capture = operator(
    "capture(Tensor ids, SymInt start, SymInt count, Tensor(a!) buffer, SymInt layer_id, int experts, "
    "Tensor(b!) rejected) -> ()",
    _launch,
    lambda *arguments: None,
)


def capture(ids: Tensor, start: int, count: int, buffer: Tensor, layer_id: int, experts: int, rejected: Tensor) -> None:
    """buffer[:count, layer_id] = ids[start : start + count], or nothing at all if one of these ids is no expert.

    ids: [rows, K] int32 or int64, any strides; rows outside the range are never read. buffer: [tokens, L, K], an
    integer dtype that holds `experts` - 1. rejected: [L] int32, 0 where nothing is wrong; a bad id leaves 1 + its row
    of the range there, and the layer takes nothing more until the reference's `raise_rejected` has read it. Never
    waits for the device, so it can be recorded in a CUDA graph.
    Raises InputError for shapes, dtypes, rows or a layer id out of range.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids: got {ids.dtype} {list(ids.shape)}, want int32 or int64 [rows, K]")
    if buffer.ndim != 3 or buffer.shape[2] != ids.shape[1]:
        raise InputError(f"buffer: got shape {list(buffer.shape)}, want [tokens, L, {ids.shape[1]}], the K of ids")
    if buffer.dtype.is_floating_point or experts - 1 > torch.iinfo(buffer.dtype).max:
        raise InputError(f"buffer: got {buffer.dtype}, want an integer dtype that holds expert id {experts - 1}")
    if rejected.shape != buffer.shape[1:2] or rejected.dtype != torch.int32 or not rejected.is_contiguous():
        got = f"{rejected.dtype} {list(rejected.shape)} of strides {rejected.stride()}"
        raise InputError(f"rejected: got {got}, want int32 [{buffer.shape[1]}] contiguous")
    if not 0 <= layer_id < buffer.shape[1]:
        raise InputError(f"layer_id: got {layer_id}, want 0 to {buffer.shape[1] - 1}, the buffer's layers")
    if start < 0 or not 0 <= count <= min(ids.shape[0] - start, buffer.shape[0]):
        raise InputError(
            f"rows: got {start} to {start + count}, want a range within the {ids.shape[0]} rows of ids, "
            f"of at most {buffer.shape[0]} rows, which the buffer holds"
        )
    _capture(ids, start, count, buffer, layer_id, experts, rejected)
