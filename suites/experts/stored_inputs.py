"""Stored weights and adapters of a case: codes of every value, and scales of which no two neighbours are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.judging.inputs import bits, integers, matrix, normal
from moe_conformance.model.specs import MLPSpec, Shape
from moe_conformance.model.storage import QuantSpec
from moe_conformance.protocol.experts import Lora

# Powers of two that scales span, and how many of them neighbours in each dim lie apart, from the last dim on: a column
# of tiles, a row, and gate and up or experts. No scale is its neighbour's, and both halves of w13 differ, too.
SPAN, STEPS = 7, (1, 2, 3)
# About how large a code is, as a power of two.
_CODES = {"fp8_e4m3": 6, "int8": 6, "int4": 2, "mxfp4": 1, "nvfp4": 1}


def stored_tensors(
    quant: QuantSpec, mlp: MLPSpec, hidden: int, experts: int, input_scale_each: bool = False
) -> dict[str, Tensor]:
    """What `quant.tensors("experts", mlp, hidden, (experts,))` names and shapes, but for the biases.

    Scales have five significant bits, so that float16 and bfloat16 hold them; zero points are not in the middle.
    """
    found = {}
    for name, shape in quant.tensors("experts", mlp, hidden, (experts,)).items():
        matrix_name, _, part = name.removeprefix("experts.").partition(".")
        if matrix_name.startswith("b"):
            continue
        columns = mlp.width if matrix_name == "w2" else hidden
        # Three of the seven powers are what the larger scales exceed the mean by.
        size = round(-0.5 * math.log2(columns)) - _CODES[quant.format] + 3
        match part:
            case "":
                found[name] = _codes(quant, shape, name)
            case "scale":
                found[name] = _scales(quant, shape, name, size)
            case "zero_point":
                least, most, dtype = (-100, 100, torch.int8) if quant.format == "int8" else (0, 16, torch.uint8)
                found[name] = integers(shape, name, most, least).to(dtype)
            case "global_scale":
                found[name] = _spread(shape, name, size - 3)
            case "input_scale":
                one = torch.full(shape, 1.375 * 2.0 ** (-2 if matrix_name == "w2" else -5))
                found[name] = one * 2.0 ** (torch.arange(experts) % 3 - 1) if input_scale_each else one
    return found


def _codes(quant: QuantSpec, shape: Shape, seed: str) -> Tensor:
    match quant.format:
        case "fp8_e4m3":
            return normal(shape, seed, std=64.0).to(torch.float8_e4m3fn)
        case "int8":
            return integers(shape, seed, 128, -127).to(torch.int8)
    return integers(shape, seed, 256).to(torch.uint8)


def _scales(quant: QuantSpec, shape: Shape, seed: str, size: int) -> Tensor:
    match quant.format:
        case "mxfp4":
            return (127 + size - _steps(shape)).to(torch.uint8)
        case "nvfp4":
            return _spread(shape, seed, 3).to(torch.float8_e4m3fn)
    return _spread(shape, seed, size)


def _steps(shape: Shape) -> Tensor:
    """int64 in [0, SPAN), another one than any neighbour's."""
    total = torch.zeros(shape, dtype=torch.int64)
    for dim, step in zip(range(-1, -len(shape) - 1, -1), STEPS, strict=False):
        index = torch.arange(shape[dim]) * step
        total += index.reshape(-1, *[1] * (-dim - 1))
    return total % SPAN


def _spread(shape: Shape, seed: str, size: int) -> Tensor:
    """float32 of three bits behind the point, at most 2^(size + 1)."""
    mantissa = 1 + (bits(shape, seed) % 8).double() / 8
    return (mantissa * torch.exp2((size - _steps(shape)).double())).float()


def adapters(case: Case, dtype: torch.dtype) -> Lora:
    """Updates as large as the weights; tokens take adapters in no order, and the first has none where any has none."""
    spec, tokens = case["lora"], case["T"]
    tensors = {}
    for name, shape in spec.tensors(case["mlp"], case["D"], case["E"]).items():
        tensors[name] = matrix(shape, name, dtype)
        tensors[name][:, list(case["absent"])] = 0
    chosen = integers((tokens,), "lora-adapters", spec.adapters)
    nobody = integers((tokens,), "lora-none", 20) < case["none"]
    if case["none"]:
        nobody[:1] = True
    return Lora(spec, tensors, chosen.masked_fill(nobody, -1))
