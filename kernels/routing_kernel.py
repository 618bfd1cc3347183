"""The kernel that routes, and its launcher. It keeps the order of steps of reference_impl/routing.py.

Condition the logits, score them, choose, weigh, normalise, scale, fill the slots of shared experts, blank the padding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import FusedShared, RoutingSpec
from moe_conformance.kernels.launch import interpreted, load_float32, require_device
from moe_conformance.kernels.scores import condition, in_precision, log_sigmoid, score, softmax
from moe_conformance.kernels.selection import TAKEN, best_groups, place_of, sort_keys, value_of


# Not specialised on the number of tokens, nor on numbers that only multiply.
@triton.jit(do_not_specialize=["tokens", "valid"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    own_scale_ptr,
    common_scale_ptr,
    given_ptr,
    ids_ptr,
    weights_ptr,
    tokens,
    valid,
    experts,
    stride_lt,
    stride_le,
    stride_b,
    stride_s,
    logit_scale,
    softcap,
    jitter,
    group_mask,
    epsilon,
    floor,
    scale,
    fused_weight,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    FUSED: tl.constexpr,
    FUSED_RULE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORE: tl.constexpr,
    SELECTOR: tl.constexpr,
    ON_LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    HAS_COMMON_SCALE: tl.constexpr,
    HAS_OWN_SCALE: tl.constexpr,
    SKIP_LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ids [T, TOP_K + FUSED], weights [T, TOP_K + (FUSED or SHARED)] of logits [T, experts + SHARED].

    Rows from `valid` on are padding. Groups lie BLOCK_S columns apart. NARROW: each step is kept in the logits' dtype.
    """
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    IDS: tl.constexpr = TOP_K + FUSED
    WEIGHTS: tl.constexpr = TOP_K + (FUSED if FUSED else SHARED)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty if NARROW else tl.float32
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_E)
    group_size = experts // GROUPS
    offs_e = column // BLOCK_S * group_size + column % BLOCK_S
    mask_t = offs_t[:, None] < valid
    mask_e = ((column % BLOCK_S < group_size) & (offs_e < experts))[None, :]
    mask_k = offs_k[None, :] < TOP_K

    offs_logits = offs_t[:, None] * stride_lt + offs_e.to(tl.int64)[None, :] * stride_le
    logits = load_float32(logits_ptr + offs_logits, mask_t & mask_e)  # [BLOCK_T, BLOCK_E]
    logits = condition(logits, logit_scale, softcap, HAS_SOFTCAP, dtype)
    scores = logits
    if not ON_LOGITS:
        scores = score(logits, mask_e, SCORE, dtype)

    places = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    if SELECTOR == "table":
        offs_given = offs_t[:, None] * TOP_K + offs_k[None, :]
        places = tl.load(given_ptr + offs_given, mask=mask_t & mask_k, other=0).to(tl.int32)
    else:
        compared = scores
        if HAS_BIAS:
            # The sum has the wider dtype of both.
            compared += load_float32(bias_ptr + offs_e.to(tl.int64)[None, :] * stride_b, mask_e)
            if bias_ptr.dtype.element_ty != tl.float32:
                compared = in_precision(compared, dtype)
        compared = tl.where(mask_e, compared, float("-inf"))
        if GROUPS > 1:
            compared = best_groups(compared, mask_e, group_mask, GROUPS, TOP_GROUPS, TOP2, BLOCK_T, BLOCK_G, BLOCK_S)
        # Columns beyond the experts are -inf, too, but lose every tie with an expert of -inf.
        keys = sort_keys(compared, BLOCK_E)
        for k in range(TOP_K):
            best = tl.max(keys, axis=1)  # [BLOCK_T]
            places = tl.where(offs_k[None, :] == k, place_of(best, BLOCK_E)[:, None], places)
            if SELECTOR == "sparsemixer":
                # Softmax of the chosen logit among the remaining ones near it.
                chosen = value_of(best)[:, None]
                far = tl.div_rn(chosen - logits, tl.maximum(tl.abs(logits), chosen)) > 2 * jitter
                near = mask_e & (keys != TAKEN) & (far == 0)
                total = tl.sum(tl.where(near, tl.exp(logits - chosen), 0.0), axis=1)
                weights = tl.where(offs_k[None, :] == k, (1.0 / total)[:, None], weights)
            keys = tl.where(keys == best[:, None], TAKEN, keys)

    ids = places // BLOCK_S * group_size + places % BLOCK_S
    if SELECTOR != "sparsemixer":
        # A table's id may not be a column here; its weight is then meaningless.
        inside = tl.minimum(tl.maximum(places, 0), BLOCK_E - 1)
        if SHARED:
            # Sigmoid scores over their sum, in logarithms: very negative logits still get a weight although their score
            # underflows to 0.
            mask_shared = (offs_k[None, :] >= TOP_K) & (offs_k[None, :] < TOP_K + SHARED)
            offs_shared = offs_t[:, None] * stride_lt + (experts - TOP_K + offs_k).to(tl.int64)[None, :] * stride_le
            shared = load_float32(logits_ptr + offs_shared, mask_t & mask_shared)
            shared = condition(shared, logit_scale, softcap, HAS_SOFTCAP, dtype)
            both = tl.where(mask_shared, shared, tl.gather(logits, inside, 1))  # [BLOCK_T, BLOCK_K]
            weights = softmax(in_precision(log_sigmoid(both), dtype), mask_k | mask_shared)
            weights = in_precision(weights, dtype)
        else:
            weights = tl.gather(scores, inside, 1)  # [BLOCK_T, BLOCK_K]
            if ON_LOGITS:
                weights = score(weights, mask_k, SCORE, dtype)
            weights = tl.where(mask_k, weights, 0.0)

    if RENORMALIZE == "sum":
        total = in_precision(in_precision(tl.sum(weights, axis=1), dtype) + epsilon, dtype)
        total = tl.where(total < floor, floor, total)
        weights = weights / total[:, None]
    elif RENORMALIZE == "norm":
        if NORM_ORDER == 1.0:
            total = tl.sum(tl.abs(weights), axis=1)
        else:
            tl.static_assert(NORM_ORDER == 2.0)
            total = tl.sqrt(tl.sum(weights * weights, axis=1))
        weights = weights / in_precision(total, dtype)[:, None]
    weights = in_precision(in_precision(weights, dtype) * scale, dtype)
    if HAS_COMMON_SCALE:
        weights = in_precision(weights * in_precision(load_float32(common_scale_ptr, True), dtype), dtype)
    if HAS_OWN_SCALE:
        own_scale = load_float32(own_scale_ptr + ids.to(tl.int64) * stride_s, mask_t & mask_k)
        weights = tl.where(mask_k, in_precision(weights * in_precision(own_scale, dtype), dtype), weights)
    if SKIP_LAST:
        skipped = ids == experts - 1
        ids = tl.where(skipped, -1, ids)
        weights = tl.where(skipped, 0.0, weights)
    if FUSED:
        # Slots behind the chosen ones; their ids follow the last one that has a column of its own.
        slot = offs_k[None, :] - TOP_K
        ids = tl.where(slot >= 0, experts - SKIP_LAST + slot, ids)
        if FUSED_RULE == "constant":
            weights = tl.where(slot >= 0, fused_weight, weights)
        elif FUSED_RULE == "share":
            total = tl.sum(tl.where(mask_k, weights, 0.0), axis=1)
            weights = tl.where(slot >= 0, (fused_weight * total)[:, None], weights)
        else:
            tl.static_assert(FUSED_RULE == "router")
    if HAS_PADDING:
        ids = tl.where(mask_t, ids, -1)
        weights = tl.where(mask_t, weights, 0.0)
        mask_t = offs_t[:, None] < tokens
    offs_ids = offs_t[:, None] * IDS + offs_k[None, :]
    tl.store(ids_ptr + offs_ids, ids, mask=mask_t & (offs_k[None, :] < IDS))
    offs_weights = offs_t[:, None] * WEIGHTS + offs_k[None, :]
    tl.store(weights_ptr + offs_weights, weights, mask=mask_t & (offs_k[None, :] < WEIGHTS))


def route_blocks(tokens: int, classes: int, groups: int, columns: int, interpret: bool) -> dict[str, int]:
    """Tile sizes. Compiled: one warp a token where E >= 128. Interpreted: few programs, for cost is per program."""
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(classes // groups)
    elements = 65536 if interpret else 512
    block_t = min(elements // (block_g * block_s), triton.next_power_of_2(tokens), elements if interpret else 64)
    block_k = triton.next_power_of_2(columns)
    return {"BLOCK_T": max(4, block_t), "BLOCK_G": block_g, "BLOCK_S": block_s, "BLOCK_K": block_k}


def route_constants(spec: RoutingSpec, fused: FusedShared, classes: int, logits: Tensor) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "TOP_K": spec.top_k,
        "SHARED": spec.shared_classes,
        "FUSED": fused.count,
        "FUSED_RULE": fused.rule,
        "NARROW": spec.score_dtype == "input" and logits.dtype != torch.float32,
        "HAS_SOFTCAP": spec.logit_softcap != 0,
        "SCORE": spec.score,
        "SELECTOR": spec.selector,
        "ON_LOGITS": spec.select_on == "logits",
        "HAS_BIAS": spec.selection_bias,
        "GROUPS": spec.groups,
        "TOP_GROUPS": spec.top_groups,
        "TOP2": spec.group_score == "top2_sum" and classes > spec.groups,
        "RENORMALIZE": spec.renormalize,
        "NORM_ORDER": spec.norm_order,
        "HAS_COMMON_SCALE": spec.global_scale,
        "HAS_OWN_SCALE": spec.per_expert_scale,
        "SKIP_LAST": spec.skip_expert,
    }


def launch_route(
    logits: Tensor,
    bias: Tensor | None,
    own_scale: Tensor | None,
    common_scale: Tensor | None,
    given: Tensor | None,
    valid_rows: int,
    spec: RoutingSpec,
    fused: FusedShared,
) -> tuple[Tensor, Tensor]:
    """ids [T, K + n] int32 and weights [T, K + n] float32 of logits [T, classes], on their device.

    n: fused.count; without fused ones, of weights, the shared experts that the router weighs. bias, own_scale,
    common_scale: the tensors that the spec asks for. given: [valid_rows, K], ids out of a table.
    """
    require_device(logits=logits, selection_bias=bias, per_expert_scale=own_scale, global_scale=common_scale)
    tokens, classes = logits.shape[0], logits.shape[1] - spec.shared_classes
    ids, weights = empty_routing(logits, spec, fused)
    if tokens:
        columns = spec.top_k + max(spec.shared_classes, fused.count)
        blocks = route_blocks(tokens, classes, spec.groups, columns, interpreted())
        with torch.cuda.device_of(logits):
            route_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
                logits,
                bias,
                own_scale,
                common_scale,
                given,
                ids,
                weights,
                tokens,
                valid_rows,
                classes,
                logits.stride(0),
                logits.stride(1),
                0 if bias is None else bias.stride(0),
                0 if own_scale is None else own_scale.stride(0),
                spec.logit_scale,
                spec.logit_softcap,
                spec.jitter,
                spec.group_mask,
                spec.epsilon,
                spec.floor,
                spec.scale,
                fused.weight,
                HAS_PADDING=valid_rows < tokens,
                **route_constants(spec, fused, classes, logits),
                **blocks,
            )
    return ids, weights


def empty_routing(logits: Tensor, spec: RoutingSpec, fused: FusedShared) -> tuple[Tensor, Tensor]:
    """What the launcher fills; also what its results are while a program is traced."""
    slots = spec.top_k + fused.count
    columns = slots if fused.count else spec.top_k + spec.shared_classes
    return (
        logits.new_empty((logits.shape[0], slots), dtype=torch.int32),
        logits.new_empty((logits.shape[0], columns), dtype=torch.float32),
    )
