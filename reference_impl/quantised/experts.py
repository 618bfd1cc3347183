"""Experts by QuantSpec: stored weights become numbers again, and activations are quantised on their way into them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec, QuantSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.reference_impl.quantised.fp4 import unpack_e2m1
from moe_conformance.reference_impl.quantised.fp8 import through_fp8
from moe_conformance.reference_impl.quantised.integers import through_int8
from moe_conformance.reference_impl.quantised.tiles import spread

if TYPE_CHECKING:
    from moe_conformance.reference_impl.experts import Around, Project

Tensors = Mapping[str, Tensor]

# The dtype that codes lie in; two a byte in uint8.
CODES = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8} | dict.fromkeys(("int4", "mxfp4", "nvfp4"), torch.uint8)
# What activations become on their way into weights of a format.
THROUGH = {"fp8_e4m3": through_fp8, "int8": through_int8}


def stored_experts(
    quant: QuantSpec, spec: MLPSpec, tensors: Tensors, hidden: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[Around]]:
    """What `routed_experts` takes for stored experts: plain tensors in dtype, and what stands around projections."""
    plain = dequantised(quant, spec, tensors, hidden, dtype)
    if quant.activations == "no":
        return plain, []
    return plain, [partial(quantised_activations, quant=quant, tensors=tensors)]


def dequantised(
    quant: QuantSpec, spec: MLPSpec, tensors: Tensors, hidden: int, dtype: torch.dtype, prefix: str = "experts"
) -> dict[str, Tensor]:
    """The experts' tensors as `spec.tensors` names and shapes them: code (minus zero point) times scale, in dtype.

    tensors: as `quant.tensors(prefix, spec, hidden, (E,))` names and shapes them; biases are handed on. Products are
    taken in float64 and rounded once.
    """
    found = {}
    for name, shape in spec.tensors(prefix, hidden).items():
        if name.rpartition(".")[2].startswith("w"):
            found[name] = _matrix(quant, tensors, name, shape[-1], spec.gated and not name.endswith(".w2")).to(dtype)
        else:
            found[name] = tensors[name]
    return found


def _matrix(quant: QuantSpec, tensors: Tensors, name: str, columns: int, halves: bool) -> Tensor:
    """One matrix of all experts, [E, rows, columns] float64; halves: gate stands above up."""
    stored = tensors[name]
    if stored.dtype != CODES[quant.format]:
        raise InputError(f"{name}: got {stored.dtype}, want {CODES[quant.format]} for {quant.format}")
    values = codes(stored, quant)[..., :columns]  # [E, rows, columns]
    tile = {"tensor": (0, 0), "channel": (1, 0), "block": quant.block, "group": (1, quant.group)}[quant.granularity]
    parts = 2 if quant.split_gate_up and halves else 1
    stacked = parts if quant.granularity in ("tensor", "block") else 1

    def of_each(own: Tensor) -> Tensor:
        by_tile = {"tensor": (len(own), stacked, 1), "channel": (*own.shape, 1)}.get(quant.granularity, own.shape)
        return spread(own.reshape(by_tile), values.shape, tile, stacked)

    if quant.zero_points:
        values = values - of_each(tensors[f"{name}.zero_point"].double())
    scale = tensors[f"{name}.scale"]
    values = values * of_each(scale if quant.format == "mxfp4" else scale.double())
    if quant.format == "nvfp4":
        whole = tensors[f"{name}.global_scale"].reshape(len(stored), parts, 1)
        values = values * spread(whole, values.shape, (0, 0), parts)
    return values


def codes(stored: Tensor, quant: QuantSpec) -> Tensor:
    """The numbers that codes stand for, before zero point and scale: [.., rows, columns] float64.

    Four-bit integers are two's complement, -8 to 7; beside zero points they are 0 to 15.
    """
    match quant.format:
        case "mxfp4" | "nvfp4":
            return unpack_e2m1(stored)
        case "int4":
            nibbles = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).double()
            return nibbles if quant.zero_points else nibbles - 16 * (nibbles >= 8)
        case _:
            return stored.double()


def quantised_activations(base: Project, quant: QuantSpec, tensors: Tensors, prefix: str = "experts") -> Project:
    """`base`, with what enters each projection quantised first, x as well as the activated hidden.

    By a scale for each row, or each row and `quant.group` columns, that is computed from them; or by the given one of
    expert and matrix, NAME.input_scale [E]. Give `base` dequantised weights: integer sums of codes, scaled afterwards,
    are the same numbers. Raises Unsupported for formats that activations do not have here.
    """
    if quant.format not in THROUGH:
        raise Unsupported(
            f"quant: got activations {quant.activations!r} into {quant.format} weights, want them into "
            f"{' or '.join(THROUGH)}; only these formats of activations are written here"
        )
    through, group = THROUGH[quant.format], quant.group if quant.activations == "group" else 0

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        scale = tensors[f"{prefix}.{name}.input_scale"][expert] if quant.activations == "static" else None
        return base(name, expert, token, through(rows, group=group, scale=scale))

    return project
