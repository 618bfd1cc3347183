"""Routing in one launch: from router logits to the experts of each token and their weights.

Twin of reference_impl/routing.py, whose order of steps it keeps: condition the logits, score them, choose, weigh,
normalise, scale. All arithmetic is float32, whatever dtype the logits have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.errors import InputError
from moe_conformance.kernels.activation import log1p_exp, sigmoid, softplus, tanh
from moe_conformance.kernels.launch import interpreted, load_float32, require_device
from moe_conformance.kernels.selection import TAKEN, best_groups, place_of, sort_keys, value_of
from moe_conformance.model.specs import RoutingSpec
from moe_conformance.reference_impl.operators import arguments, operator
from moe_conformance.reference_impl.routing import Routed, ids_of_tokens, named

# One program holds all classes of its tokens in registers: 64-bit sort keys, 32 a thread at 4 warps and 4 tokens.
MAX_CLASSES = 1024
# The output tile is [BLOCK_T, BLOCK_K]; no public model chooses more than 22 (Nemotron-3-Super).
MAX_TOP_K = 32


@triton.jit
def score(logits, mask, SCORE: tl.constexpr):
    """The score of each logit of a row; softmax over those in mask, the others get 0."""
    if SCORE == "softmax":
        largest = tl.max(tl.where(mask, logits, float("-inf")), axis=1)
        exponentials = tl.where(mask, tl.exp(logits - largest[:, None]), 0.0)
        return exponentials / tl.sum(exponentials, axis=1)[:, None]
    elif SCORE == "sigmoid":
        return tl.where(mask, sigmoid(logits), 0.0)
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        return tl.where(mask, tl.sqrt_rn(softplus(logits)), 0.0)


@triton.jit
def condition(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    logits *= logit_scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


# No compilation for each number of tokens or for numbers that only multiply.
@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    own_scale_ptr,
    common_scale_ptr,
    given_ptr,
    ids_ptr,
    weights_ptr,
    tokens,
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
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
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
    """ids [T, TOP_K], weights [T, TOP_K + SHARED] of logits [T, experts + SHARED]. Groups lie BLOCK_S columns apart."""
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_E)
    group_size = experts // GROUPS
    offs_e = column // BLOCK_S * group_size + column % BLOCK_S
    mask_t = offs_t[:, None] < tokens
    mask_e = ((column % BLOCK_S < group_size) & (offs_e < experts))[None, :]
    mask_k = offs_k[None, :] < TOP_K

    offs_logits = offs_t[:, None] * stride_lt + offs_e.to(tl.int64)[None, :] * stride_le
    logits = load_float32(logits_ptr + offs_logits, mask_t & mask_e)  # [BLOCK_T, BLOCK_E]
    logits = condition(logits, logit_scale, softcap, HAS_SOFTCAP)
    scores = logits
    if not ON_LOGITS:
        scores = score(logits, mask_e, SCORE)

    places = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    if SELECTOR == "table":
        offs_given = offs_t[:, None] * TOP_K + offs_k[None, :]
        places = tl.load(given_ptr + offs_given, mask=mask_t & mask_k, other=0).to(tl.int32)
    else:
        compared = scores
        if HAS_BIAS:
            compared += load_float32(bias_ptr + offs_e.to(tl.int64)[None, :] * stride_b, mask_e)
        compared = tl.where(mask_e, compared, float("-inf"))
        if GROUPS > 1:
            compared = best_groups(compared, mask_e, group_mask, GROUPS, TOP_GROUPS, TOP2, BLOCK_T, BLOCK_G, BLOCK_S)
        # Columns beyond the experts are not below an expert of -inf, but lose every tie with it.
        keys = sort_keys(compared, BLOCK_E)
        for k in range(TOP_K):
            best = tl.max(keys, axis=1)  # [BLOCK_T]
            places = tl.where(offs_k[None, :] == k, place_of(best, BLOCK_E)[:, None], places)
            if SELECTOR == "sparsemixer":
                # Softmax of the chosen among those that are left and near it.
                chosen = value_of(best)[:, None]
                far = tl.div_rn(chosen - logits, tl.maximum(tl.abs(logits), chosen)) > 2 * jitter
                near = mask_e & (keys != TAKEN) & (far == 0)
                total = tl.sum(tl.where(near, tl.exp(logits - chosen), 0.0), axis=1)
                weights = tl.where(offs_k[None, :] == k, (1.0 / total)[:, None], weights)
            keys = tl.where(keys == best[:, None], TAKEN, keys)

    ids = places // BLOCK_S * group_size + places % BLOCK_S
    if SELECTOR != "sparsemixer":
        # A table's id may be no column here; its weight means nothing then.
        inside = tl.minimum(tl.maximum(places, 0), BLOCK_E - 1)
        if SHARED:
            # Sigmoid scores over their sum, in logarithms: logits far below 0 have a weight where their score is 0.
            mask_shared = (offs_k[None, :] >= TOP_K) & (offs_k[None, :] < TOP_K + SHARED)
            offs_shared = offs_t[:, None] * stride_lt + (experts - TOP_K + offs_k).to(tl.int64)[None, :] * stride_le
            shared = load_float32(logits_ptr + offs_shared, mask_t & mask_shared)
            shared = condition(shared, logit_scale, softcap, HAS_SOFTCAP)
            both = tl.where(mask_shared, shared, tl.gather(logits, inside, 1))  # [BLOCK_T, BLOCK_K]
            weights = score(tl.minimum(both, 0.0) - log1p_exp(-tl.abs(both)), mask_k | mask_shared, "softmax")
        else:
            weights = tl.gather(scores, inside, 1)  # [BLOCK_T, BLOCK_K]
            if ON_LOGITS:
                weights = score(weights, mask_k, SCORE)
            weights = tl.where(mask_k, weights, 0.0)

    if RENORMALIZE == "sum":
        total = tl.sum(weights, axis=1) + epsilon
        total = tl.where(total < floor, floor, total)
        weights = weights / total[:, None]
    elif RENORMALIZE == "norm":
        if NORM_ORDER == 1.0:
            weights = weights / tl.sum(tl.abs(weights), axis=1)[:, None]
        else:
            tl.static_assert(NORM_ORDER == 2.0)
            weights = weights / tl.sqrt(tl.sum(weights * weights, axis=1))[:, None]
    weights *= scale
    if HAS_COMMON_SCALE:
        weights *= load_float32(common_scale_ptr, True)
    mask_ids = mask_t & mask_k
    if HAS_OWN_SCALE:
        own_scale = load_float32(own_scale_ptr + ids.to(tl.int64) * stride_s, mask_ids)
        weights = tl.where(mask_k, weights * own_scale, weights)
    if SKIP_LAST:
        skipped = ids == experts - 1
        ids = tl.where(skipped, 0, ids)
        weights = tl.where(skipped, 0.0, weights)
    tl.store(ids_ptr + offs_t[:, None] * TOP_K + offs_k[None, :], ids, mask=mask_ids)
    offs_weights = offs_t[:, None] * (TOP_K + SHARED) + offs_k[None, :]
    tl.store(weights_ptr + offs_weights, weights, mask=mask_t & (offs_k[None, :] < TOP_K + SHARED))


def route_blocks(tokens: int, classes: int, groups: int, columns: int, interpret: bool) -> dict[str, int]:
    """Tile sizes. Compiled: one warp a token where E >= 128. Interpreted: few programs, for cost is per program."""
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(classes // groups)
    elements = 65536 if interpret else 512
    block_t = min(elements // (block_g * block_s), triton.next_power_of_2(tokens), elements if interpret else 64)
    block_k = triton.next_power_of_2(columns)
    return {"BLOCK_T": max(4, block_t), "BLOCK_G": block_g, "BLOCK_S": block_s, "BLOCK_K": block_k}


def route_constants(spec: RoutingSpec, classes: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "TOP_K": spec.top_k,
        "SHARED": spec.shared_classes,
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


def _launch(
    logits: Tensor,
    bias: Tensor | None,
    own_scale: Tensor | None,
    common_scale: Tensor | None,
    given: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    spec = RoutingSpec(*values)
    require_device(logits=logits, selection_bias=bias, per_expert_scale=own_scale, global_scale=common_scale)
    tokens, classes = logits.shape[0], logits.shape[1] - spec.shared_classes
    columns = spec.top_k + spec.shared_classes
    ids = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, columns, dtype=torch.float32, device=logits.device)
    if tokens:
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
                **route_constants(spec, classes),
                **blocks,
            )
    return ids, weights


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    spec = RoutingSpec(*rest[4:])
    tokens, columns = logits.shape[0], spec.top_k + spec.shared_classes
    return (
        logits.new_empty((tokens, spec.top_k), dtype=torch.int32),
        logits.new_empty((tokens, columns), dtype=torch.float32),
    )


# `capacity` comes last and is never given.
_FIELDS = [field for field in fields(RoutingSpec) if field.name != "capacity"]
_route = operator(
    "route(Tensor logits, Tensor? bias, Tensor? own_scale, Tensor? common_scale, Tensor? given, "
    f"{arguments(_FIELDS)}) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def route_logits(
    logits: Tensor,
    spec: RoutingSpec,
    tensors: Mapping[str, Tensor],
    *,
    token_ids: Tensor | None = None,
    sequences: int = 1,
) -> Routed:
    """Choose and weigh the experts of each token.

    logits: [T, classes] float of any strides, rounded to float32, in which all is computed whatever spec.score_dtype
    is.
    tensors: router.selection_bias, .per_expert_scale, .global_scale, .table, where the spec asks for them.
    token_ids: T integers in any shape, for a table. sequences: as in the reference, where they matter for capacity.
    returns ids [T, K] int32, largest first, unique and in range for any row, ties to the lowest id, a NaN larger than
    any number; weights [T, K] float32; shared [T, n] float32.
    Raises InputError for what one program does not hold (classes > 1024, K > 32) and for what does not stand in one
    row: capacity and product keys; for a tensor that is missing or does not fit; for K > E.
    """
    _check(logits, spec)
    classes = logits.shape[1] - spec.shared_classes
    bias = named(tensors, "router.selection_bias", classes) if spec.selection_bias else None
    own = named(tensors, "router.per_expert_scale", classes) if spec.per_expert_scale else None
    common = named(tensors, "router.global_scale", 1) if spec.global_scale else None
    given = None
    if spec.selector == "table":
        given = ids_of_tokens(named(tensors, "router.table", None, spec.top_k), token_ids, len(logits)).contiguous()
    ids, weights = _route(logits, bias, own, common, given, *(getattr(spec, field.name) for field in _FIELDS))
    shared = weights[:, spec.top_k :] if spec.shared_classes else None
    return Routed(ids, weights[:, : spec.top_k], shared)


def _check(logits: Tensor, spec: RoutingSpec) -> None:
    if logits.ndim != 2:
        raise InputError(f"logits: got shape {list(logits.shape)}, want [T, E]; flatten the batch first")
    if not logits.is_floating_point():
        raise InputError(f"logits: got {logits.dtype}, want a float dtype")
    classes = logits.shape[1] - spec.shared_classes
    if classes > MAX_CLASSES:
        raise InputError(f"logits: got {classes} experts, want at most {MAX_CLASSES}, which one program holds")
    if not 1 <= spec.top_k <= classes:
        raise InputError(f"top_k: got {spec.top_k}, want 1 to {classes}, the number of experts in the logits")
    if spec.top_k + spec.shared_classes > MAX_TOP_K:
        raise InputError(f"top_k: got {spec.top_k}, want at most {MAX_TOP_K}, which one program holds")
    if classes % spec.groups:
        raise InputError(f"logits: got {classes} experts, want a multiple of the {spec.groups} groups")
    if not 1 <= spec.top_groups <= spec.groups:
        raise InputError(f"top_groups: got {spec.top_groups}, want 1 to {spec.groups}, the number of groups")
    if spec.capacity or spec.selector == "product_keys":
        what = "capacity" if spec.capacity else "product_keys"
        raise InputError(f"spec: got {what}, want none: a program sees its own rows alone; use the reference")
    if spec.renormalize == "norm" and spec.norm_order not in (1.0, 2.0):
        raise InputError(f"norm_order: got {spec.norm_order}, want 1 or 2")


def softmax_topk(logits: Tensor, top_k: int, renormalize: bool) -> Routing:
    """Softmax over all experts, then the top_k; with renormalize their weights sum to 1. As `route_logits`."""
    return Routing(*route_logits(logits, RoutingSpec(top_k, renormalize="sum" if renormalize else "no"), {})[:2])


def gemma4(logits: Tensor, top_k: int, per_expert_scale: Tensor) -> Routing:
    """Softmax over all experts, top_k, renormalise, then multiply each weight by its expert's own scale.

    per_expert_scale: [E] float of any stride; otherwise as softmax_topk, whose ids it shares.
    """
    spec = RoutingSpec(top_k, renormalize="sum", per_expert_scale=True)
    return Routing(*route_logits(logits, spec, {"router.per_expert_scale": per_expert_scale})[:2])


def route(inputs: RouteInputs) -> Routing:
    """Route by the named method. Raises InputError for inputs the kernel does not take, or a missing scale."""
    if inputs.method != "gemma4":
        return softmax_topk(inputs.logits, inputs.top_k, renormalize=inputs.method == "softmax_topk_renorm")
    if inputs.per_expert_scale is None:
        raise InputError("per_expert_scale: got None, want [E]; the gemma4 method has one")
    return gemma4(inputs.logits, inputs.top_k, inputs.per_expert_scale)
