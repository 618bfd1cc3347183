"""Combine: the pairs of each token summed by weight, scaled, cut and added to what is always on.

Twin of reference_impl/combine.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted, load_float32, local_expert, require_device, rounded


# Not specialised on the number of tokens: one compilation serves all.
@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    outputs_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    x_ptr,
    added_ptr,
    out_ptr,
    tokens,
    width,
    experts,
    identity,
    scale,
    stride_or,
    stride_wt,
    stride_wk,
    stride_xt,
    stride_xd,
    stride_at,
    stride_ad,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t, :width] = scale * sum over k of weights[t, k] * outputs[t TOP_K + k, :width] + added[t, :width]."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < tokens
    mask = mask_t[:, None] & (offs_d[None, :] < width)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    passed_on = tl.zeros([BLOCK_T], tl.float32)
    passes = tl.zeros([BLOCK_T], tl.int1)
    for k in tl.static_range(TOP_K):
        pair = offs_t * TOP_K + k
        # Row and weight of a pair without an expert are meaningless.
        taken = local_expert(ids_ptr, pair, mask_t, map_ptr, experts, HAS_MAP) >= 0
        weight = tl.load(
            weights_ptr + offs_t * stride_wt + k * tl.cast(stride_wk, tl.int64), mask=mask_t, other=0.0
        ).to(tl.float32)
        output = load_float32(outputs_ptr + pair[:, None] * stride_or + offs_d[None, :], mask & taken[:, None])
        if WEIGHTED:
            output *= tl.where(taken, weight, 0.0)[:, None]
        total += output
        if HAS_IDENTITY:
            expert = tl.load(ids_ptr + pair, mask=mask_t, other=-1)
            named = (expert >= experts) & (expert < experts + identity)
            passed_on += tl.where(named, weight, 0.0)
            passes = passes | named
    if HAS_IDENTITY:
        # x is read only for tokens with an identity expert: 0 times its contents could be NaN.
        x_ptrs = x_ptr + offs_t[:, None] * stride_xt + offs_d[None, :] * stride_xd
        total += passed_on[:, None] * load_float32(x_ptrs, mask & passes[:, None])
    total *= scale
    if HAS_ADDED:
        total += load_float32(added_ptr + offs_t[:, None] * stride_at + offs_d[None, :] * stride_ad, mask)
    out = rounded(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * width + offs_d[None, :], out, mask=mask)


def combine_blocks(tokens: int, width: int, interpret: bool) -> dict[str, int]:
    """Tile sizes. Compiled: 16 bytes a thread and load for two-byte elements, one token a program."""
    block_d = min(triton.next_power_of_2(width), 4096 if interpret else 1024)
    return {"BLOCK_T": min(triton.next_power_of_2(tokens), 65536 // block_d) if interpret else 1, "BLOCK_D": block_d}


def combine(
    outputs: Tensor,
    ids: Tensor,
    weights: Tensor,
    x: Tensor,
    experts: int,
    *,
    weighted: bool = True,
    output_scale: float = 1.0,
    identity_experts: int = 0,
    added: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Each token's sum of weight times expert output, times output_scale, plus added; in float32, rounded once.

    outputs: [T K, D'], rows contiguous; columns behind D, padding, are never read, nor are rows of pairs that no expert
    takes. ids: [T, K] int32 or int64; weights: [T, K] float, not looked at for those pairs; both of any strides.
    x: [T, D], passed on by ids in [experts, experts + identity_experts). weighted: False where the weights are in the
    outputs already. added: [T, D], what is always on. expert_map: as for `align`.
    returns [T, D] in x's dtype. Raises InputError for shapes that do not belong together.
    """
    require_device(outputs=outputs, ids=ids, weights=weights, x=x, added=added, expert_map=expert_map)
    (tokens, width), top_k = x.shape, ids.shape[1]
    if outputs.shape[0] != ids.numel() or outputs.shape[1] < width or outputs.stride(1) != 1:
        raise InputError(f"outputs: got shape {list(outputs.shape)}, want [{ids.numel()}, at least {width}] contiguous")
    if weights.shape != ids.shape or len(ids) != tokens:
        raise InputError(f"ids and weights: got {list(ids.shape)} and {list(weights.shape)}, want [{tokens}, K] both")
    if added is not None and added.shape != x.shape:
        raise InputError(f"added: got shape {list(added.shape)}, want {list(x.shape)}, x's")
    ids, expert_map = ids.contiguous(), None if expert_map is None else expert_map.contiguous()
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    if out.numel():
        blocks = combine_blocks(tokens, width, interpreted())
        grid = (triton.cdiv(tokens, blocks["BLOCK_T"]), triton.cdiv(width, blocks["BLOCK_D"]))
        with torch.cuda.device_of(x):
            combine_kernel[grid](
                outputs,
                weights,
                ids,
                expert_map,
                x,
                added,
                out,
                tokens,
                width,
                experts,
                identity_experts,
                output_scale,
                outputs.stride(0),
                *weights.stride(),
                *x.stride(),
                *((0, 0) if added is None else added.stride()),
                TOP_K=top_k,
                WEIGHTED=weighted,
                HAS_MAP=expert_map is not None,
                HAS_IDENTITY=identity_experts > 0,
                HAS_ADDED=added is not None,
                **blocks,
            )
    return out
