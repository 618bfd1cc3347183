"""Experts: each token's chosen gated MLPs, summed by routing weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.operators import operator


def gated_mlp(x: Tensor, w13: Tensor, w2: Tensor, activation: str) -> Tensor:
    """w2 (act(gate) * up), where gate is the upper half of w13's rows and up the lower.

    x: [T, D]; w13: [2F, D]; w2: [D, F]. activation: "silu" or "gelu_tanh" (Hendrycks and Gimpel 2016, tanh form).
    """
    gate, up = F.linear(x, w13).chunk(2, dim=-1)  # [T, F] each
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return F.linear(act * up, w2)


def _routed_experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, activation: str) -> Tensor:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w13.shape[0]:
        raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, want 0 to {w13.shape[0] - 1}")
    total = x.new_zeros(x.shape[0], w2.shape[1], dtype=weights.dtype)  # [T, D]
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        output = gated_mlp(x[token], w13[expert], w2[expert], activation)
        total.index_add_(0, token, output.to(total.dtype) * weights[token, slot, None])
    return total.to(x.dtype)


def _routed_experts_shape(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[1])


# Opaque, as in engines: which rows an expert gets depends on data.
_operator = operator(
    "routed_experts(Tensor x, Tensor w13, Tensor w2, Tensor ids, Tensor weights, str activation) -> Tensor",
    _routed_experts,
    _routed_experts_shape,
)


def routed_experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Sum over each token's experts of weight times expert output, accumulated in float32 or wider.

    x: [T, D]; w13: [E, 2F, D]; w2: [E, D, F]; ids: [T, K] int in [0, E); weights: [T, K] float32 or float64.
    returns [T, D] in x's dtype. Raises InputError for an id out of range.
    """
    output: Tensor = _operator(x, w13, w2, ids, weights, activation)
    return output
