"""Experts: one MLP in every form that models use, and the sum over each token's experts by routing weight.

Ids: -1 is a pair without an expert. An id outside [-1, N) raises InputError here. Kernels cannot raise without waiting
for the device, so they treat any id that names no expert as -1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import ExpertsInputs
from moe_conformance.errors import InputError
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.lora import with_adapters
from moe_conformance.reference_impl.operators import arguments, keywords, operator
from moe_conformance.reference_impl.parallel.expert_map import local_ids
from moe_conformance.reference_impl.quantised.experts import stored_experts
from moe_conformance.reference_impl.tensors import check_tensors

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


# (matrix: "w13", "w1" or "w2"; rows [n, in]) -> [n, out], bias included
Matrix = Callable[[str, Tensor], Tensor]
# (matrix; expert; token [n] int64, whose rows these are; rows [n, in]) -> [n, out], bias included, a new tensor
Project = Callable[[str, int, Tensor, Tensor], Tensor]
Around = Callable[[Project], Project]


def one_mlp(
    x: Tensor, spec: MLPSpec, matrix: Matrix, weight: Tensor | None = None, output_norm: Tensor | None = None
) -> Tensor:
    """w2 activate(w13 x), the two products left to `matrix`; see `mlp`."""
    if weight is not None and spec.weight_on == "input":
        x = (x * weight).to(x.dtype)
    hidden = activate(matrix("w13" if spec.gated else "w1", x), spec)  # [T, F]
    if weight is not None and spec.weight_on == "w2_input":
        hidden = (hidden * weight.repeat_interleave(hidden.shape[1] // weight.shape[1], dim=1)).to(x.dtype)
    output = matrix("w2", hidden)  # [T, D]
    if output_norm is not None:
        output = normalised_output(output, output_norm, spec.output_norm)
    return output * weight if weight is not None and spec.weight_on == "output" else output


def normalised_output(output: Tensor, norm: Tensor, eps: float) -> Tensor:
    """RMSNorm of (1 + norm) * output over the true width; padding columns after it stay garbage."""
    width = len(norm)
    normed = rms_norm(output[:, :width] * (1 + norm), 1.0, eps)
    return torch.cat([normed, output[:, width:]], dim=1) if width < output.shape[1] else normed


def mlp(x: Tensor, spec: MLPSpec, tensors: Mapping[str, Tensor], prefix: str, weight: Tensor | None = None) -> Tensor:
    """One expert, or a shared or dense MLP: w2 activate(w13 x).

    x: [T, D]. tensors: as `spec.tensors(prefix, D)` names and shapes them. weight: [T, n], what the router gives each
    token, multiplied in where `spec.weight_on` says; n > 1 for n MLPs side by side, each weight for its F / n columns.
    returns [T, D] in x's dtype; where a weight multiplies the output, in the wider of both.
    """

    def matrix(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, tensors[f"{prefix}.{name}"], tensors.get(f"{prefix}.b{name[1:]}"))

    return one_mlp(x, spec, matrix, weight, tensors[f"{prefix}.output_norm"] if spec.output_norm else None)


def plain(tensors: Mapping[str, Tensor]) -> Project:
    """Matrix and bias of each expert, canonical names: experts.w13 [E, 2F, D], experts.b13 [E, 2F], ...

    Weights may be wider than rows: products are then taken in the wider dtype, and rounded once to that of rows.
    """

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        w, bias = tensors[f"experts.{name}"][expert], tensors.get(f"experts.b{name[1:]}")
        dtype = torch.promote_types(rows.dtype, w.dtype)
        output = F.linear(rows.to(dtype), w.to(dtype), None if bias is None else bias[expert].to(dtype))
        return output.to(rows.dtype)

    return project


def _routed_sum(
    x: Tensor,
    spec: MLPSpec,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    weights: Tensor,
    expert_map: Tensor | None,
    identity_experts: int,
    output_scale: float,
    around: Sequence[Around] = (),
) -> Tensor:
    """`routed_experts`: the one loop over experts. Storage formats and adapters are left to the projections."""
    experts = len(tensors["experts.w2"])  # on this rank; identity experts follow them
    ids = _own_ids(ids, experts, identity_experts, expert_map)
    project = plain(tensors)
    for outer in around:
        project = outer(project)
    total = x.new_zeros(x.shape, dtype=wide(x.dtype))  # [T, D]

    chosen, pair = ids.flatten().sort()  # [T K], pairs of one expert side by side
    kept = chosen >= 0
    chosen, pair = chosen[kept], pair[kept]
    token, weight = pair // ids.shape[1], weights.flatten()[pair, None].to(total.dtype)
    hit, sizes = chosen.unique_consecutive(return_counts=True)
    slices = (part.split(sizes.tolist()) for part in (token, x[token], weight))
    for expert, token_e, x_e, weight_e in zip(hit.tolist(), *slices, strict=True):
        if expert < experts:

            def matrix(name: str, rows: Tensor, expert: int = expert, token: Tensor = token_e) -> Tensor:
                return project(name, expert, token, rows)

            output = one_mlp(x_e, spec, matrix, weight_e, tensors.get("experts.output_norm"))
        else:
            output = x_e * weight_e
        total.index_add_(0, token_e, output.to(total.dtype))
    return (total * output_scale).to(x.dtype)


def _own_ids(ids: Tensor, held: int, identity_experts: int, expert_map: Tensor | None) -> Tensor:
    """Local ids on this rank, below `held`; -1 for other ranks' experts. Identity experts keep their ids."""
    experts = held if expert_map is None else len(expert_map)
    last = experts + identity_experts - 1
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) <= last:
        got = f"{int(ids.min())} to {int(ids.max())}"
        raise InputError(f"ids: got {got}, want 0 to {last}, or -1 for a pair without an expert")
    if expert_map is None:
        return ids
    identity = ids >= experts
    return torch.where(identity, ids, local_ids(ids.masked_fill(identity, -1), expert_map))


def _routed_experts(x: Tensor, names: Sequence[str], experts: Sequence[Tensor], *rest: Any, **fields: Any) -> Tensor:
    return _routed_sum(x, MLPSpec(**fields), dict(zip(names, experts, strict=True)), *rest)


def _routed_experts_shape(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


# An opaque operator, as in engines: which rows an expert gets depends on data.
_operator = operator(
    "routed_experts(Tensor x, str[] names, Tensor[] experts, Tensor ids, Tensor weights, Tensor? expert_map, "
    f"int identity_experts, float output_scale, {arguments(MLPSpec)}) -> Tensor",
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
    expert_map: Tensor | None = None,
    output_scale: float = 1.0,
    around: Sequence[Around] = (),
) -> Tensor:
    """Sum over each token's experts of weight times expert output, accumulated in float32 or wider.

    x: [T, D]. tensors: as `spec.tensors("experts", D, (E,))` names and shapes them, in x's dtype or a wider one; with
    expert_map, of this rank's experts by local id. ids: [T, K] int; those from E on are identity experts, which pass x
    on; -1 is a dropped pair, which adds nothing whatever its weight is. weights: [T, K] float. expert_map: [E] int32,
    the local id of each expert, -1 for those of other ranks, whose pairs add nothing. output_scale: multiplies the sum.
    around: wrappers of the plain projections, the outermost last: quantised activations, adapters.
    returns [T, D] in x's dtype. Raises InputError for an id out of range.
    """
    if around:
        return _routed_sum(x, spec, tensors, ids, weights, expert_map, identity_experts, output_scale, around)
    names = list(spec.tensors("experts", *x.shape[1:]))
    experts = [tensors[name] for name in names]
    output: Tensor = _operator(
        x, names, experts, ids, weights, expert_map, identity_experts, output_scale, **keywords(spec)
    )
    return output


def experts(inputs: ExpertsInputs) -> Tensor:
    """The routed sum [T, D] in x's dtype; see ExpertsInputs for shapes.

    Raises InputError for tensors that are not those of the specs, and for an id out of range; Unsupported for what
    quantised/experts.py does not compute.
    """
    x, spec, quant, tensors = inputs.x, inputs.mlp, inputs.quant, inputs.tensors
    lead = (len(tensors["experts.w2"]),)
    around: list[Around] = []
    if quant is None:
        check_tensors(spec.tensors("experts", x.shape[1], lead), tensors)
    else:
        check_tensors(quant.tensors("experts", spec, x.shape[1], lead), tensors)
        tensors, around = stored_experts(quant, spec, tensors, x.shape[1], wide(x.dtype))
    if inputs.lora is not None:
        around = [*around, partial(with_adapters, lora=inputs.lora)]
    return routed_experts(
        x,
        spec,
        tensors,
        inputs.ids,
        inputs.weights,
        identity_experts=inputs.identity_experts,
        expert_map=inputs.expert_map,
        output_scale=inputs.output_scale,
        around=around,
    )
