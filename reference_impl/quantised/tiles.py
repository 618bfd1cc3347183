"""Scales of quantised weights: each belongs to one tile of one expert's matrix, and to nothing else.

A quantised tensor holds codes, a few bits each, and scales, one a tile of rows x columns: w = code * scale. Weights
of all experts are fused, [E, rows, cols]; w13 is two matrices above each other, `stacked=2`, and tiles never reach
across the seam: with 192 rows a half, the blocks of 128 hold rows 0-127, 128-191, 192-319 and 320-383.

fp8.py: FP8 and w8a8. fp4.py: MXFP4, NVFP4. integers.py: int8, pack-quantized.
gptq.py: GPTQ, AWQ. experts.py: experts on all of them. Products are taken in float64, where they
are exact, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.quote import quoted

# Rows and columns of a tile; 0 is all there are.
Tile = tuple[int, int]
PER_TENSOR: Tile = (0, 0)
PER_CHANNEL: Tile = (1, 0)
BLOCK_128: Tile = (128, 128)  # DeepSeek-V3, https://arxiv.org/abs/2412.19437, 3.3.2


def check(name: str, got: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Raise InputError unless `got` has this shape (-1: any size) and one of the dtypes."""
    fits = got.ndim == len(shape) and all(want in (-1, size) for want, size in zip(shape, got.shape, strict=True))
    if not fits or got.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(f"{name}: got {got.dtype} {list(got.shape)}, want {wanted} {list(shape)}")


def integer(name: str, got: object, least: int, most: float = math.inf) -> int:
    """An argument that a checkpoint says. Raises InputError unless it is an integer within the bounds."""
    if isinstance(got, bool) or not isinstance(got, int) or not least <= got <= most:
        raise InputError(f"{name}: got {quoted(got)}, want an integer from {least} to {most}")
    return got


def pair(name: str, got: object, least: int) -> tuple[int, int]:
    """Rows and columns. Raises InputError unless they are two integers of at least so many."""
    sides = got.tolist() if isinstance(got, Tensor) and got.ndim == 1 else got
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise InputError(f"{name}: got {quoted(sides)}, want two integers, rows and columns")
    rows, columns = (integer(name, side, least) for side in sides)
    return rows, columns


def scale_shape(rows: int, cols: int, tile: Tile, stacked: int) -> tuple[int, int]:
    """How many scales a matrix has down and across; tiles at the ends may be cut. Raises InputError for odd halves."""
    if rows % integer("stacked", stacked, 1):
        raise InputError(f"weight: got {rows} rows, want a multiple of {stacked}, the matrices stacked in it")
    height, width = _sides(rows, cols, tile, stacked)
    return stacked * -(-(rows // stacked) // height), -(-cols // width)


def spread(scale: Tensor, shape: Sequence[int], tile: Tile, stacked: int = 1) -> Tensor:
    """Each element's own scale: [E, *scale_shape(...)] -> `shape`, [E, rows, cols], in float64.

    scale: a dtype of `scale_values`. Raises InputError for another shape or dtype.
    """
    experts, rows, cols = shape
    down, across = scale_shape(rows, cols, tile, stacked)
    check("scale", scale, (experts, down, across), *SCALE_DTYPES)
    height, width = _sides(rows, cols, tile, stacked)
    parts: Tensor = scale_values(scale).unflatten(1, (stacked, down // stacked))
    tall = parts.repeat_interleave(height, 2)[:, :, : rows // stacked]  # the last tile is cut at the seam
    return tall.repeat_interleave(width, 3)[..., :cols].flatten(1, 2)


def tile_amax(weight: Tensor, tile: Tile, stacked: int = 1) -> Tensor:
    """The largest magnitude of each tile: [E, rows, cols] -> [E, *scale_shape(...)]."""
    rows, cols = weight.shape[1:]
    down, across = scale_shape(rows, cols, tile, stacked)
    height, width = _sides(rows, cols, tile, stacked)
    part = rows // stacked
    padded = torch.nn.functional.pad(
        weight.abs().unflatten(1, (stacked, part)), (0, across * width - cols, 0, down // stacked * height - part)
    )
    tiles: Tensor = padded.unflatten(3, (across, width)).unflatten(2, (down // stacked, height))
    return tiles.amax((3, 5)).flatten(1, 2)


def _sides(rows: int, cols: int, tile: Tile, stacked: int) -> Tile:
    height, width = pair("tile", tile, 0)
    return height or max(rows // stacked, 1), width or max(cols, 1)


SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu, torch.uint8)


def scale_values(scale: Tensor) -> Tensor:
    """float64 values of scales: floats are themselves, float8_e8m0fnu and uint8 are powers of two.

    e8m0: 2^(byte - 127), and NaN for 255. OCP Microscaling Formats 1.0, 5.4.1.
    """
    if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return scale.double()
    byte = scale.view(torch.uint8).double()
    return torch.where(byte == 255, torch.nan, torch.exp2(byte - 127))


def round_to_float(x: Tensor, mantissa: int, least_exponent: int, largest: float) -> Tensor:
    """The nearest numbers that have `mantissa` bits behind the point, ties to even, at most `largest` in magnitude.

    least_exponent: of the smallest normal number, below which steps stay the same. x: float64. IEEE 754-2019, 4.3.1.
    """
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least_exponent)
    step = torch.exp2((exponent - mantissa).double())
    return (torch.round(x / step) * step).clamp(-largest, largest)


def finite(name: str, weight: Tensor) -> Tensor:
    """weight in float64. Raises InputError where it is not [E, rows, cols] or has NaN or infinity, which no code is."""
    check(name, weight, (-1, -1, -1), torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not weight.isfinite().all():
        raise InputError(f"{name}: got NaN or infinity, want finite values; they have no code")
    return weight.double()
