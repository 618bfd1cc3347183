"""Combine: each token's expert outputs summed by weight, scaled, cut to the true width, added to what is always on."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.reference_impl.experts import wide


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
    """Each token's sum of weight times expert output, times output_scale, plus added.

    outputs: [T K, D'], row t K + k is pair (t, k)'s; columns behind D are padding. ids, weights: [T, K]. x: [T, D],
    passed on by ids in [experts, experts + identity_experts). weighted: False where the weights are in the outputs
    already. added: [T, D]. expert_map: [experts], the local id of each expert, -1 for those of other ranks.
    returns [T, D] in x's dtype, summed in float32 or wider. A pair without an expert adds nothing, whatever its row and
    weight hold. As in a kernel, an id out of range is such a pair (experts.py).
    """
    (tokens, width), top_k = x.shape, ids.shape[1]
    taken = (ids >= 0) & (ids < experts)  # [T, K]
    if expert_map is not None:
        taken &= expert_map[ids.where(taken, 0)] >= 0
    identity = (ids >= experts) & (ids < experts + identity_experts)
    share = weights if weighted else torch.ones_like(weights)

    def summed(share: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        products = share[..., None].to(wide(x.dtype)) * rows  # [T, K, D]
        return products.masked_fill(~which[..., None], 0).sum(1)

    total = summed(share, outputs.unflatten(0, (tokens, top_k))[..., :width], taken)
    total = (total + summed(weights, x[:, None], identity)) * output_scale
    return (total if added is None else total + added).to(x.dtype)
