"""Experts whose two projections are more than a matrix: quantised activations, or what an adapter adds to them.

A weight that is only stored in fewer bits needs none of this: dequantise it and give it to `routed_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import activate, wide
from moe_conformance.reference_impl.quantised.fp8 import through_fp8

# (name: "w13", "w1" or "w2"; expert; tokens [n] int64; rows [n, in], those tokens') -> [n, out], a new tensor
Project = Callable[[str, int, Tensor, Tensor], Tensor]


def projected_experts(
    x: Tensor, spec: MLPSpec, project: Project, ids: Tensor, weights: Tensor, *, experts: int
) -> Tensor:
    """`routed_experts` with both projections left to `project`, biases included.

    x: [T, D]. ids: [T, K] int in [0, E], E for a dropped pair; weights: [T, K] float. returns [T, D] in x's dtype,
    summed in float32 or wider. Raises InputError for an id out of range and for experts with an output norm.
    """
    if spec.output_norm or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= experts):
        raise InputError(f"experts: got output_norm {spec.output_norm}, ids {ids.tolist()}, want 0, ids 0 to {experts}")
    total = x.new_zeros(x.shape, dtype=wide(x.dtype))  # [T, D]
    for expert in ids[ids < experts].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, slot, None]
        rows = (x[token] * weight).to(x.dtype) if spec.weight_on == "input" else x[token]
        hidden = activate(project("w13" if spec.gated else "w1", expert, token, rows), spec)  # [n, F]
        hidden = (hidden * weight).to(x.dtype) if spec.weight_on == "w2_input" else hidden
        output = project("w2", expert, token, hidden).to(total.dtype)
        total.index_add_(0, token, output * weight.to(total.dtype) if spec.weight_on == "output" else output)
    return total.to(x.dtype)


def plain(tensors: Mapping[str, Tensor]) -> Project:
    """Matrix and bias of each expert, canonical names: experts.w13 [E, 2F, D], experts.b13 [E, 2F], ..."""

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        bias = tensors.get(f"experts.b{name[1:]}")
        return F.linear(rows, tensors[f"experts.{name}"][expert], None if bias is None else bias[expert])

    return project


def fp8_activations(base: Project, *, group: int = 0, input_scale: Mapping[str, Tensor] | None = None) -> Project:
    """w8a8: what enters each projection is quantised to e4m3fn first, x as well as the activated hidden.

    Dynamic, a scale a token and group of columns (`through_fp8`); or static, input_scale "w13" and "w2", [E] each.
    Give `base` dequantised weights: integer sums of codes, scaled afterwards, are the same numbers.
    """

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        scale = None if input_scale is None else input_scale[name][expert]
        return base(name, expert, token, through_fp8(rows, group=group, scale=scale))

    return project
