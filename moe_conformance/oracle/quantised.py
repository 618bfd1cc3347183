"""What stored experts are as numbers, and what quantised activations become, with their roundings.

Written apart from reference_impl, so that a fault there is not repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_conformance.model.specs import MLPSpec
from moe_conformance.model.storage import QuantSpec
from moe_conformance.oracle.value import Value

# e2m1 by its four bits: s e e m (OCP Microscaling Formats 1.0, 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The largest codes that activations are scaled to: of e4m3fn, and of symmetric int8.
_LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}
# Roundings of a weight that a path makes of code, zero point and scale: the product, and one with a global scale.
WEIGHT_ROUNDINGS = 2


def plain_weights(
    quant: QuantSpec, mlp: MLPSpec, tensors: Mapping[str, Tensor], hidden: int, prefix: str = "experts"
) -> dict[str, Tensor]:
    """The experts' tensors as numbers, exactly, in float64; tensors as `quant.tensors(prefix, mlp, hidden, (E,))`."""
    found = {}
    for name, (*_, columns) in mlp.tensors(prefix, hidden).items():
        is_matrix = name.rpartition(".")[2].startswith("w")
        found[name] = _matrix(quant, tensors, name, columns, mlp) if is_matrix else tensors[name]
    return found


def _matrix(quant: QuantSpec, tensors: Mapping[str, Tensor], name: str, columns: int, mlp: MLPSpec) -> Tensor:
    """[E, rows, columns] float64."""
    values = _codes(tensors[name], quant)[..., :columns]
    rows = values.shape[1]
    parts = 2 if quant.split_gate_up and mlp.gated and not name.endswith(".w2") else 1
    part = torch.arange(rows) // (rows // parts)  # of each row
    inside = torch.arange(rows) % (rows // parts)
    column = torch.arange(columns)
    scale = tensors[f"{name}.scale"]
    if scale.dtype == torch.uint8:  # e8m0
        scale = torch.where(scale == 255, math.nan, torch.exp2(scale.double() - 127))

    def of_each(own: Tensor) -> Tensor:
        """Each element's own of what there is one of a tile."""
        own = own.double()
        match quant.granularity:
            case "tensor":
                return own.reshape(len(own), -1)[:, part, None]
            case "channel":
                return own[..., None]
            case "block":
                down = own.shape[1] // parts
                return own[:, part * down + inside // quant.block[0]][..., column // quant.block[1]]
            case "group":
                return own[..., column // quant.group]

    if quant.zero_points:
        values = values - of_each(tensors[f"{name}.zero_point"])
    values = values * of_each(scale)
    if quant.format == "nvfp4":
        whole = tensors[f"{name}.global_scale"].double()
        values = values * whole.reshape(len(whole), -1)[:, part, None]
    return values


def _codes(stored: Tensor, quant: QuantSpec) -> Tensor:
    if stored.dtype != torch.uint8:
        return stored.double()
    both = torch.stack([stored % 16, stored // 16], dim=-1).flatten(-2).long()  # the low bits are the even column
    if quant.format != "int4":
        return torch.tensor(_E2M1, dtype=torch.float64)[both]
    return (both if quant.zero_points else (both + 8) % 16 - 8).double()


def through_codes(x: Value, quant: QuantSpec, given: Tensor | None, compute: torch.dtype, store: torch.dtype) -> Value:
    """What a kernel sees of rows [T, D] that it quantises: codes times scales, of each row or group, or of `given`.

    A path finds the largest magnitude, divides it, divides by the result or multiplies by its inverse: where the exact
    quotient lies that close to the middle between two codes, either is right. store: what the product may be kept in.
    """
    largest = _LARGEST[quant.format]
    if given is not None:
        scale = Value.of(given)
    else:
        group = quant.group if quant.activations == "group" else x.exact.shape[-1]
        scale = (x.map(torch.abs).largest_of(group) * Value.of(1 / largest)).stored(compute, 2)
    codes = x.over(scale, compute).stored(compute)
    codes = codes.snapped(lambda v: _rounded(v, quant.format).clamp(-largest, largest))
    return (codes * scale).stored(store)


def _rounded(v: Tensor, name: str) -> Tensor:
    """The nearest code, ties to even."""
    if name == "int8":
        return v.round()
    exponent = torch.frexp(v).exponent - 1
    step = torch.exp2((exponent.clamp(min=-6) - 3).double())
    return (v / step).round() * step
