"""The kernel of both projections, and its launcher.

A program multiplies one block of pairs of one expert, as dispatch made it, with BLOCK_N columns of that expert's
weights. Rows are read and written where they lie, by token and by pair, so nothing is permuted in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import Aligned, MLPSpec
from moe_conformance.kernels.activation import activate
from moe_conformance.kernels.float8 import Quantised, load_fp8, native_fp8
from moe_conformance.kernels.launch import load_float32, local_expert, operand, require_device, rounded
from moe_conformance.kernels.tuning import Tile
from moe_conformance.reference_impl.padding import round_up


@triton.jit
def rows_of_block(
    block,
    pairs,
    experts,
    slot_to_pair_ptr,
    expert_of_block_ptr,
    ids_ptr,
    map_ptr,
    ALIGNED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The expert of a block, -1 for none, its pairs and which of them there are; not ALIGNED, pair `block` alone."""
    offs_m = tl.arange(0, BLOCK_M)
    if ALIGNED:
        expert = tl.load(expert_of_block_ptr + block)
        pair = tl.load(slot_to_pair_ptr + block.to(tl.int64) * BLOCK_M + offs_m)
        mask = pair < pairs
    else:
        pair = block + offs_m
        mask = offs_m == 0
        expert = tl.max(local_expert(ids_ptr, pair, mask, map_ptr, experts, HAS_MAP), axis=0)
    return expert.to(tl.int64), pair.to(tl.int64), mask


# Not specialised on the number of tokens: one compilation serves all.
@triton.jit(do_not_specialize=["pairs", "blocks"])
def grouped_matmul_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    slot_to_pair_ptr,
    expert_of_block_ptr,
    ids_ptr,
    map_ptr,
    pairs,
    experts,
    held,
    blocks,
    depth,
    width,
    up_offset,
    up_scale_row,
    up_bias_offset,
    stride_xr,
    stride_xd,
    stride_we,
    stride_wf,
    stride_wd,
    stride_se,
    stride_sf,
    stride_sd,
    stride_be,
    stride_bf,
    stride_or,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    ROW_STEP: tl.constexpr,
    WEIGHT_ON: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[pair, :width] = act(x[pair // PAIRS_PER_ROW, :depth] @ w[expert]^T), of gate and up rows where GATED.

    w [E, rows, >= depth]: row n ROW_STEP makes column n of out, with its up row up_offset elements behind it.
    SCALE_N x SCALE_K: the tile of w that one scale is for, 0 for weights without; up_scale_row: how many rows behind
    a gate row's its up row counts among them. blocks: of pairs. held: experts in w.
    """
    # Programs in groups of GROUP_M blocks of pairs, so that those that read the same weights run side by side.
    program = tl.program_id(0)
    columns = tl.cdiv(width, BLOCK_N)
    first = program // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(blocks - first, GROUP_M)
    block = first + program % (GROUP_M * columns) % height
    column = program % (GROUP_M * columns) // height

    expert, pair, mask_m = rows_of_block(
        block, pairs, experts, slot_to_pair_ptr, expert_of_block_ptr, ids_ptr, map_ptr, ALIGNED, HAS_MAP, BLOCK_M
    )
    # A map must not lead beyond the existing weights.
    if (expert < 0) | (expert >= held):
        return
    offs_n = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_n = offs_n < width
    x_ptrs = x_ptr + (pair // PAIRS_PER_ROW)[:, None] * stride_xr + offs_k[None, :] * stride_xd  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + expert * stride_we + (offs_n * ROW_STEP)[None, :] * stride_wf + offs_k[:, None] * stride_wd
    s_ptrs = scale_ptr
    up_s_ptrs = scale_ptr
    if SCALE_K:
        s_ptrs = scale_ptr + expert * stride_se + offs_n // SCALE_N * stride_sf  # [BLOCK_N]
        up_s_ptrs = scale_ptr + expert * stride_se + (offs_n + up_scale_row) // SCALE_N * stride_sf

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_x = mask_x & (offs_k[None, :] < depth - k)
            mask_w = mask_w & (offs_k[:, None] < depth - k)
        x = operand(tl.load(x_ptrs, mask=mask_x, other=0.0))
        if SCALE_K:
            # One scale a column in this step, for BLOCK_K divides SCALE_K.
            w = operand(load_fp8(w_ptrs, mask_w, dtype, NATIVE_FP8))
            scale = load_float32(s_ptrs + k // SCALE_K * stride_sd, mask_n)
            gate += tl.dot(x, w, input_precision="ieee") * scale[None, :]
            if GATED:
                w = operand(load_fp8(w_ptrs + up_offset, mask_w, dtype, NATIVE_FP8))
                scale = load_float32(up_s_ptrs + k // SCALE_K * stride_sd, mask_n)
                up += tl.dot(x, w, input_precision="ieee") * scale[None, :]
        else:
            gate = tl.dot(x, operand(tl.load(w_ptrs, mask=mask_w, other=0.0)), gate, input_precision="ieee")
            if GATED:
                w = operand(tl.load(w_ptrs + up_offset, mask=mask_w, other=0.0))
                up = tl.dot(x, w, up, input_precision="ieee")
        x_ptrs += BLOCK_K * tl.cast(stride_xd, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wd, tl.int64)

    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    if WEIGHT_ON != "output":
        weight = tl.load(weights_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)
    if WEIGHT_ON == "input":
        gate *= weight[:, None]
        up *= weight[:, None]
    if HAS_BIAS:
        b_ptrs = bias_ptr + expert * stride_be + offs_n * ROW_STEP * stride_bf
        gate += load_float32(b_ptrs, mask_n)[None, :]
        if GATED:
            up += load_float32(b_ptrs + up_bias_offset, mask_n)[None, :]
    if ACTIVATION != "no":
        gate = activate(gate, up, ACTIVATION, GATED, CLAMP, LIMIT, UP_LIMIT, ALPHA, UP_OFFSET)
    if WEIGHT_ON == "w2_input":
        gate *= weight[:, None]
    out_ptrs = out_ptr + pair[:, None] * stride_or + offs_n[None, :]
    tl.store(out_ptrs, rounded(gate, dtype), mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Dispatched:
    """Which pairs each block of a grouped product takes.

    ids: [T, K] int32 or int64, contiguous. experts: how many the ids count. aligned: of `align` with blocks of
    `block`, or None for few pairs, each of which is then a block of its own, `block` rows tall with one in use.
    """

    ids: Tensor
    experts: int
    block: int
    aligned: Aligned | None = None
    expert_map: Tensor | None = None

    @property
    def blocks(self) -> int:
        return self.ids.numel() if self.aligned is None else self.aligned.expert_of_block.numel()


def activation_constants(spec: MLPSpec | None) -> dict[str, Any]:
    """What the kernel's epilogue is compiled for; None for a product alone."""
    if spec is None:
        spec, activation = MLPSpec(0, gated=False), "no"
    else:
        activation = spec.activation
    return {
        "GATED": spec.gated,
        "ACTIVATION": activation,
        "CLAMP": spec.clamp,
        "LIMIT": spec.limit,
        "UP_LIMIT": spec.up_limit or spec.limit,
        "ALPHA": spec.alpha,
        "UP_OFFSET": spec.up_offset,
    }


def launch_grouped_matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    dispatched: Dispatched,
    tile: Tile,
    *,
    spec: MLPSpec | None,
    quantised: Quantised | None,
    pairs_per_row: int,
    interleaved: bool = False,
    weights: Tensor | None = None,
    weight_on: str = "output",
) -> Tensor:
    """out [T K, width] in x's dtype; arguments as `gate_up` and `down` have them, which checked them."""
    aligned, pairs = dispatched.aligned, dispatched.ids.numel()
    require_device(x=x, w=w, bias=bias, weights=weights, ids=dispatched.ids, expert_map=dispatched.expert_map)
    constants = activation_constants(spec)
    halves, step = 2 if constants["GATED"] else 1, 2 if interleaved else 1
    depth, width = x.shape[1], w.shape[1] // halves
    out = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    up = 1 if interleaved else width  # rows from a gate row to its up row
    scale, scale_n, scale_k, native = None, 0, 0, False
    scale_strides: tuple[int, ...] = (0, 0, 0)
    up_scale_row = 0
    if quantised is not None:
        scale, native = quantised.scale, native_fp8(x)
        scale_strides = scale.stride()
        scale_n = quantised.tile[0] or (width if quantised.stacked else w.shape[1])
        scale_k = quantised.tile[1] or w.shape[2]
        up_scale_row = round_up(width, scale_n) if quantised.stacked else width
        w = w if native else w.view(torch.uint8)
    block_k = min(tile.block_k, scale_k & -scale_k) if scale_k and scale_k < w.shape[2] else tile.block_k
    with torch.cuda.device_of(x):
        grouped_matmul_kernel[(dispatched.blocks * triton.cdiv(width, tile.block_n),)](
            x,
            w,
            scale,
            bias,
            None if weights is None else weights.contiguous(),
            out,
            None if aligned is None else aligned.slot_to_pair,
            None if aligned is None else aligned.expert_of_block,
            dispatched.ids,
            dispatched.expert_map,
            pairs,
            dispatched.experts,
            len(w),
            dispatched.blocks,
            depth,
            width,
            up * w.stride(1),
            up_scale_row,
            0 if bias is None else up * bias.stride(1),
            *x.stride(),
            *w.stride(),
            *scale_strides,
            *((0, 0) if bias is None else bias.stride()),
            out.stride(0),
            PAIRS_PER_ROW=pairs_per_row,
            ROW_STEP=step,
            WEIGHT_ON=weight_on,
            HAS_BIAS=bias is not None,
            **constants,
            SCALE_N=scale_n,
            SCALE_K=scale_k,
            NATIVE_FP8=native,
            ALIGNED=aligned is not None,
            HAS_MAP=dispatched.expert_map is not None,
            EVEN_K=depth % block_k == 0,
            BLOCK_M=dispatched.block,
            BLOCK_N=tile.block_n,
            BLOCK_K=block_k,
            GROUP_M=tile.group_m,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
