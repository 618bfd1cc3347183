"""FP8 weights with scales per tensor, channel or block, and activations quantised to FP8 as they come (w8a8)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.reference_impl.quantised.tiles import Tile, check, finite, round_to_float, spread, tile_amax

# dtype: mantissa bits, exponent of the smallest normal number, largest value.
# e4m3fn, e5m2: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433; fnuz: https://arxiv.org/abs/2206.02915.
FP8 = {
    torch.float8_e4m3fn: (3, -6, 448.0),
    torch.float8_e4m3fnuz: (3, -7, 240.0),
    torch.float8_e5m2: (2, -14, 57344.0),
}


def dequantise_fp8(
    weight: Tensor, scale: Tensor, *, tile: Tile, stacked: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """weight * scale, each tile by its own.

    weight: [E, rows, cols], a dtype of FP8. scale: [E, down, across] of `scale_shape(rows, cols, tile, stacked)`; for
    w13 (stacked=2) PER_TENSOR wants [E, 2, 1], gate's and up's, PER_CHANNEL [E, 2F, 1], BLOCK_128 [E, 2 ceil(F / 128),
    ceil(D / 128)]. (1, 32) with e8m0 scales is MXFP8. Checkpoints call it weight_scale_inv or weight_scale; both
    multiply. returns [E, rows, cols]. Raises InputError for other shapes and dtypes.
    """
    check("weight", weight, (-1, -1, -1), *FP8)
    return (weight.double() * spread(scale, weight.shape, tile, stacked)).to(dtype)


def quantise_fp8(
    weight: Tensor,
    *,
    tile: Tile,
    stacked: int = 1,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """FP8 codes [E, rows, cols], nearest with ties to even and saturating, and scales [E, down, across] float32.

    scale: of the checkpoint; without it each tile's largest magnitude over the largest code, rounded up to a power
    of two if asked for (ue8m0, DeepSeek-V3.1). Scales stay normal numbers: a tile of zeros does not divide by zero.
    """
    values = finite("weight", weight)
    mantissa, least_exponent, largest = FP8[dtype]
    if scale is None:
        ideal = (tile_amax(values, tile, stacked) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (torch.exp2(torch.log2(ideal).ceil()) if power_of_two else ideal).float()
    scaled = values / spread(scale, values.shape, tile, stacked)
    return round_to_float(scaled, mantissa, least_exponent, largest).to(dtype), scale


def through_fp8(x: Tensor, *, group: int = 0, scale: Tensor | None = None, power_of_two: bool = False) -> Tensor:
    """What an FP8 kernel sees of activations: quantised to e4m3fn and back, [T, cols] in x's dtype.

    A scale a token and group of `group` columns, computed from them (dynamic); group 0: one a token, 128:
    DeepSeek-V3. scale: a scalar, for all tokens (static, input_scale of the checkpoint).
    """
    tile = (1, group)
    if scale is not None:
        tile, scale = (0, 0), scale.reshape(1, 1, 1)
    codes, scale = quantise_fp8(x[None], tile=tile, scale=scale, power_of_two=power_of_two)
    return dequantise_fp8(codes, scale, tile=tile, dtype=x.dtype)[0]
