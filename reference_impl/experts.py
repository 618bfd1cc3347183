"""Experts: one MLP in every form a model gives it, and each token's chosen ones summed by routing weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.operators import arguments, operator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda v: F.relu(v).square(),  # Primer, https://arxiv.org/abs/2109.08668
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and norms are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, scale: Tensor | float, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale for each row of x [T, D], in x's dtype (https://arxiv.org/abs/1910.07467)."""
    return (F.rms_norm(x.to(wide(x.dtype)), x.shape[1:], eps=eps) * scale).to(x.dtype)


def activate(projected: Tensor, spec: MLPSpec) -> Tensor:
    """What enters w2: [T, 2F], gate beside up, or [T, F] without a gate -> [T, F] in the same dtype."""
    dtype = projected.dtype
    v = projected.to(wide(dtype)) if spec.dtype == "float32" else projected

    def act(v: Tensor) -> Tensor:
        return ACTIVATIONS[spec.activation](spec.alpha * v) / spec.alpha  # silu(a v) / a = v sigmoid(a v)

    if not spec.gated:
        return act(v).to(dtype)
    gate, up = v.chunk(2, dim=1)
    limit, up_limit = spec.limit, spec.up_limit or spec.limit
    match spec.clamp:
        case "no":
            gate = act(gate)
        case "before":
            gate, up = act(gate.clamp(max=limit)), up.clamp(-up_limit, up_limit)
        case "after":
            gate, up = act(gate).clamp(max=limit), up.clamp(-up_limit, up_limit)
        case "tanh":
            gate = limit * torch.tanh(gate / limit) * torch.sigmoid(gate)
            up = up_limit * torch.tanh(up / up_limit)
    return (gate * (up + spec.up_offset)).to(dtype)


def mlp(x: Tensor, spec: MLPSpec, tensors: Mapping[str, Tensor], prefix: str, weight: Tensor | None = None) -> Tensor:
    """One expert, or a shared or dense MLP: w2 activate(w13 x).

    x: [T, D]. tensors: as `spec.tensors(prefix, D)` names and shapes them. weight: [T, n], what the router gives each
    token, multiplied in where `spec.weight_on` says; n > 1 for n MLPs side by side, each weight for its F / n columns.
    returns [T, D] in x's dtype; where a weight multiplies the output, in the wider of both.
    """
    first = "13" if spec.gated else "1"
    if weight is not None and spec.weight_on == "input":
        x = (x * weight).to(x.dtype)
    projected = F.linear(x, tensors[f"{prefix}.w{first}"], tensors.get(f"{prefix}.b{first}"))
    hidden = activate(projected, spec)  # [T, F]
    if weight is not None and spec.weight_on == "w2_input":
        hidden = (hidden * weight.repeat_interleave(hidden.shape[1] // weight.shape[1], dim=1)).to(x.dtype)
    output = F.linear(hidden, tensors[f"{prefix}.w2"], tensors.get(f"{prefix}.b2"))
    if spec.output_norm:
        output = rms_norm(output * (1 + tensors[f"{prefix}.output_norm"]), 1.0, spec.output_norm)
    return output * weight if weight is not None and spec.weight_on == "output" else output


def _routed_experts(
    x: Tensor,
    names: Sequence[str],
    experts: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    count: int,
    identity_experts: int,
    *fields: Any,
) -> Tensor:
    spec, dropped = MLPSpec(*fields), count + identity_experts
    total = x.new_zeros(x.shape, dtype=wide(x.dtype))  # [T, D]

    chosen, pair = ids.flatten().sort()  # [T K], pairs of one expert side by side
    if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) <= dropped:
        raise InputError(
            f"ids: got {int(chosen[0])} to {int(chosen[-1])}, want 0 to {dropped - 1}, or {dropped} for a dropped pair"
        )
    kept = chosen < dropped
    chosen, pair = chosen[kept], pair[kept]
    token, weight = pair // ids.shape[1], weights.flatten()[pair, None].to(total.dtype)
    hit, sizes = chosen.unique_consecutive(return_counts=True)
    slices = (part.split(sizes.tolist()) for part in (token, x[token], weight))
    for expert, token_e, x_e, weight_e in zip(hit.tolist(), *slices, strict=True):
        if expert < count:
            # All but the output norm hold one row an expert.
            own = {n: t if n == "experts.output_norm" else t[expert] for n, t in zip(names, experts, strict=True)}
            output = mlp(x_e, spec, own, "experts", weight_e)
        else:
            output = x_e * weight_e
        total.index_add_(0, token_e, output.to(total.dtype))
    return total.to(x.dtype)


def _routed_experts_shape(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


# Opaque, as in engines: which rows an expert gets depends on data.
_operator = operator(
    "routed_experts(Tensor x, str[] names, Tensor[] experts, Tensor ids, Tensor weights, int count, "
    f"int identity_experts, {arguments(fields(MLPSpec))}) -> Tensor",
    _routed_experts,
    _routed_experts_shape,
)


def routed_experts(
    x: Tensor,
    spec: MLPSpec,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    weights: Tensor,
    *,
    identity_experts: int = 0,
) -> Tensor:
    """Sum over each token's experts of weight times expert output, accumulated in float32 or wider.

    x: [T, D]. tensors: as `spec.tensors("experts", D, (E,))` names and shapes them. ids: [T, K] int; those from E on
    are identity experts, which pass x on; the one behind the last of them marks a dropped pair, which adds nothing
    whatever its weight is. weights: [T, K] float.
    returns [T, D] in x's dtype. Raises InputError for an id out of range.
    """
    names = list(spec.tensors("experts", *x.shape[1:]))
    values = [getattr(spec, field.name) for field in fields(spec)]
    experts, count = [tensors[name] for name in names], len(tensors["experts.w2"])
    output: Tensor = _operator(x, names, experts, ids, weights, count, identity_experts, *values)
    return output
