"""Routing in one launch: softmax, top-k, renormalisation and per-expert scale. Twin of reference_impl/routing.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import RouteInputs, Routing
from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted, load_float32, require_device
from moe_conformance.operators import operator

# One program holds all experts of its tokens in registers: 64-bit sort keys, 32 a thread at 4 warps and 4 tokens.
MAX_EXPERTS = 1024
# The output tile is [BLOCK_T, BLOCK_K]; no public model chooses more than 22 (Nemotron-3-Super).
MAX_TOP_K = 32


@triton.jit
def route_kernel(
    logits_ptr,
    scale_ptr,
    ids_ptr,
    weights_ptr,
    tokens,
    experts,
    stride_lt,
    stride_le,
    stride_se,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t[:, None] < tokens
    mask_e = offs_e[None, :] < experts

    # softmax over all experts
    offs_logits = offs_t[:, None] * stride_lt + offs_e.to(tl.int64)[None, :] * stride_le
    logits = load_float32(logits_ptr + offs_logits, mask_t & mask_e)  # [BLOCK_T, BLOCK_E]
    largest = tl.max(tl.where(mask_e, logits, float("-inf")), axis=1)
    scores = tl.where(mask_e, tl.exp(logits - largest[:, None]), 0.0)
    scores = scores / tl.sum(scores, axis=1)[:, None]

    # The bits of a score order as it does (none is negative), a NaN above all; the low half breaks ties to the
    # lowest id, so no two keys are equal. Lanes beyond E score no more than an expert, and lose every tie. -1, below
    # every key, marks what is taken.
    bits = tl.where(scores == scores, scores.to(tl.int32, bitcast=True), 0x7FC00000)
    keys = (bits.to(tl.int64) << 32) | (BLOCK_E - 1 - offs_e).to(tl.int64)[None, :]

    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.max(keys, axis=1)  # [BLOCK_T]
        keys = tl.where(keys == best[:, None], -1, keys)
        best_id = BLOCK_E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        best_score = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        ids = tl.where(offs_k[None, :] == k, best_id[:, None], ids)
        weights = tl.where(offs_k[None, :] == k, best_score[:, None], weights)

    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    mask_out = mask_t & (offs_k[None, :] < TOP_K)
    if HAS_SCALE:
        weights *= load_float32(scale_ptr + ids.to(tl.int64) * stride_se, mask_out)
    offs_out = offs_t[:, None] * TOP_K + offs_k[None, :]
    tl.store(ids_ptr + offs_out, ids, mask=mask_out)
    tl.store(weights_ptr + offs_out, weights, mask=mask_out)


def route_blocks(tokens: int, experts: int, top_k: int, interpret: bool) -> dict[str, int]:
    """Tile sizes. Compiled: one warp a token where E >= 128. Interpreted: few programs, for cost is per program."""
    block_e = triton.next_power_of_2(experts)
    elements = 65536 if interpret else 512
    block_t = max(4, min(elements // block_e, triton.next_power_of_2(tokens), 64 if not interpret else elements))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": triton.next_power_of_2(top_k)}


def _launch(logits: Tensor, top_k: int, renormalize: bool, per_expert_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = logits if per_expert_scale is None else per_expert_scale
    require_device(logits=logits, per_expert_scale=scale)
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        blocks = route_blocks(tokens, experts, top_k, interpreted())
        with torch.cuda.device_of(logits):
            route_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
                logits,
                scale,
                ids,
                weights,
                tokens,
                experts,
                logits.stride(0),
                logits.stride(1),
                scale.stride(0),
                TOP_K=top_k,
                RENORMALIZE=renormalize,
                HAS_SCALE=per_expert_scale is not None,
                **blocks,
            )
    return ids, weights


def _fake(logits: Tensor, top_k: int, renormalize: bool, per_expert_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


_route = operator(
    "route(Tensor logits, int top_k, bool renormalize, Tensor? per_expert_scale) -> (Tensor, Tensor)", _launch, _fake
)


def _check_logits(logits: Tensor, top_k: int) -> None:
    if logits.ndim != 2:
        raise InputError(f"logits: got shape {list(logits.shape)}, want [T, E]; flatten the batch first")
    if not logits.is_floating_point():
        raise InputError(f"logits: got {logits.dtype}, want a float dtype")
    experts = logits.shape[1]
    if experts > MAX_EXPERTS:
        raise InputError(f"logits: got {experts} experts, want at most {MAX_EXPERTS}, which one program holds")
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k: got {top_k}, want 1 to {experts}, the number of experts in the logits")
    if top_k > MAX_TOP_K:
        raise InputError(f"top_k: got {top_k}, want at most {MAX_TOP_K}, which one program holds")


def softmax_topk(logits: Tensor, top_k: int, renormalize: bool) -> Routing:
    """Softmax over all experts, then the top_k; with renormalize their weights sum to 1.

    logits: [T, E] float of any strides, E <= 1024, top_k <= 32; rounded to float32, in which all is computed.
    returns ids [T, K] int32, largest first, ties to the lowest id, unique for any row; weights [T, K] float32.
    Raises InputError for anything else.
    """
    _check_logits(logits, top_k)
    return Routing(*_route(logits, top_k, renormalize, None))


def gemma4(logits: Tensor, top_k: int, per_expert_scale: Tensor) -> Routing:
    """Softmax over all experts, top_k, renormalise, then multiply each weight by its expert's own scale.

    per_expert_scale: [E] float of any stride; otherwise as softmax_topk, whose ids it shares.
    """
    _check_logits(logits, top_k)
    if per_expert_scale.shape != logits.shape[-1:]:
        raise InputError(
            f"per_expert_scale: got shape {list(per_expert_scale.shape)}, want [{logits.shape[-1]}], one an expert"
        )
    return Routing(*_route(logits, top_k, True, per_expert_scale))


def route(inputs: RouteInputs) -> Routing:
    """Route by the named method. Raises InputError for inputs the kernel does not take, or a missing scale."""
    if inputs.method != "gemma4":
        return softmax_topk(inputs.logits, inputs.top_k, renormalize=inputs.method == "softmax_topk_renorm")
    if inputs.per_expert_scale is None:
        raise InputError("per_expert_scale: got None, want [E]; the gemma4 method has one")
    return gemma4(inputs.logits, inputs.top_k, inputs.per_expert_scale)
