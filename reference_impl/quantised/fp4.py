"""FP4 weights: e2m1 codes, two a byte, with a scale for every 32 (MXFP4) or 16 (NVFP4) along a row.

e2m1, bits s e e m: 0 0.5 1 1.5 2 3 4 6, then the same with a minus. The low nibble of a byte comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.reference_impl.padding import round_up
from moe_conformance.reference_impl.quantised.tiles import (
    check,
    finite,
    round_to_float,
    scale_values,
    spread,
    tile_amax,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LARGEST_EXPONENT = 2  # of 6 = 1.5 * 2^2
E4M3 = torch.float8_e4m3fn


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[..., n] uint8 -> [..., 2 n] float64. OCP Microscaling Formats 1.0, 5.3.3."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    magnitude = torch.tensor(E2M1, dtype=torch.float64, device=packed.device)[(nibbles & 7).long()]
    return torch.where(nibbles >= 8, -magnitude, magnitude)


def pack_e2m1(values: Tensor) -> Tensor:
    """[..., 2 n] float64 -> [..., n] uint8; nearest, ties to even, beyond 6 is 6."""
    rounded = round_to_float(values, 1, 0, E2M1[-1])
    codes = torch.bucketize(rounded.abs(), torch.tensor(E2M1, dtype=torch.float64, device=values.device))
    codes = (codes + 8 * rounded.signbit()).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Code times 2^(scale - 127), NaN where the scale is 255. OCP Microscaling Formats 1.0.

    blocks: [E, rows, G, 16] uint8, as gpt-oss stores them (a packed [E, rows, cols / 2] is .unflatten(-1, (-1, 16))).
    scales: [E, rows, G] uint8 or float8_e8m0fnu. returns [E, rows, 32 G]; rows as stored, which gpt-oss interleaves:
    gate, up, gate, ... Raises InputError for other shapes and dtypes.
    """
    check("blocks", blocks, (-1, -1, -1, 16), torch.uint8)
    check("scales", scales, blocks.shape[:3], torch.uint8, torch.float8_e8m0fnu)
    return (unpack_e2m1(blocks) * scale_values(scales)[..., None]).flatten(-2).to(dtype)


def quantise_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """blocks [E, rows, G, 16] and scales [E, rows, G], both uint8, as in `dequantise_mxfp4`.

    A block's scale is its largest magnitude's power of two, over that of 6: OCP Microscaling Formats 1.0, 6.3.
    Raises InputError unless the columns are a multiple of 32.
    """
    values = _in_groups(weight, 32)
    amax = tile_amax(values, (1, 32))  # [E, rows, G]
    exponent = torch.frexp(amax).exponent - 1 - E2M1_LARGEST_EXPONENT
    exponent = exponent.where(amax > 0, -127).clamp(-127, 127)
    packed = pack_e2m1(values / spread((exponent + 127).to(torch.uint8), values.shape, (1, 32)))
    return packed.unflatten(-1, (-1, 16)), (exponent + 127).to(torch.uint8)


def dequantise_nvfp4(
    packed: Tensor,
    scale: Tensor,
    *,
    weight_scale_2: Tensor | None = None,
    weight_global_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Code * block scale * weight_scale_2 (ModelOpt), or code * block scale / weight_global_scale (compressed-tensors).

    packed: [E, rows, cols / 2] uint8. scale: [E, rows, cols / 16] float8_e4m3fn, not swizzled (`unswizzle`).
    weight_scale_2, weight_global_scale: [E, n] float32, exactly one of them, for the n matrices stacked in the rows:
    [E, 2] for w13, gate's and up's. returns [E, rows, cols]. Raises InputError for other shapes and dtypes.
    Source: Pretraining Large Language Models with NVFP4, https://arxiv.org/abs/2509.25149.
    """
    check("packed", packed, (-1, -1, -1), torch.uint8)
    experts, rows, half = packed.shape
    check("scale", scale, (experts, rows, half // 8), E4M3)
    if half % 8 or (weight_scale_2 is None) == (weight_global_scale is None):
        raise InputError(
            f"nvfp4: got {half} bytes a row, weight_scale_2 {_given(weight_scale_2)}, weight_global_scale "
            f"{_given(weight_global_scale)}, want a multiple of 8 bytes and exactly one of the two scales"
        )
    if weight_scale_2 is not None:
        factor = _of_rows("weight_scale_2", weight_scale_2, experts, rows)
    else:
        assert weight_global_scale is not None
        factor = 1 / _of_rows("weight_global_scale", weight_global_scale, experts, rows)
    return (unpack_e2m1(packed) * scale.double().repeat_interleave(16, -1) * factor).to(dtype)


def quantise_nvfp4(weight: Tensor, *, stacked: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """packed, scale and weight_scale_2 [E, stacked] float32, as in `dequantise_nvfp4`.

    weight_scale_2 is a matrix's largest magnitude over 6 * 448, so that its largest block has scale 448; then
    each block's largest magnitude becomes 6. Raises InputError unless the columns are a multiple of 16.
    """
    values = _in_groups(weight, 16)
    tiny = torch.finfo(torch.float32).tiny
    whole = (tile_amax(values, (0, 0), stacked) / (6 * 448)).clamp(min=tiny).float()[..., 0]  # [E, stacked]
    factor = _of_rows("weight_scale_2", whole, *values.shape[:2])
    block = tile_amax(values, (1, 16)) / 6 / factor
    scale = round_to_float(block, 3, -6, 448.0).to(E4M3)
    unit = scale.double() * factor  # 0 where a block is too small for its matrix: all its codes are 0
    unit = unit.where(unit > 0, torch.inf).repeat_interleave(16, -1)
    return pack_e2m1(values / unit), scale, whole


def swizzle(scale: Tensor) -> Tensor:
    """Block scales in the order that Blackwell's tensor cores read: [..., rows, cols] -> [..., P, Q], padded with 0.

    P: rows rounded up to 128, Q: cols to 4. In memory, tiles of 128 x 4 follow each other along a row of tiles; in a
    tile, (r, c) lies at 16 (r % 32) + 4 (r // 32) + c. Source: cuBLAS, 1D Block Scaling Factors Layout.
    """
    rows, cols = scale.shape[-2:]
    padded = scale.new_zeros(*scale.shape[:-2], round_up(rows, 128), round_up(cols, 4))
    padded[..., :rows, :cols] = scale
    tiles: Tensor = padded.unflatten(-2, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [..., P / 128, 4, 32, Q / 4, 4]
    return tiles.movedim(-2, -4).transpose(-3, -2).reshape(padded.shape)  # [..., P / 128, Q / 4, 32, 4, 4]


def unswizzle(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `swizzle`, cut to [..., rows, cols]. Raises InputError if the padded sizes are others."""
    height, width = swizzled.shape[-2:]
    if (height, width) != (round_up(rows, 128), round_up(cols, 4)):
        raise InputError(
            f"swizzled: got {height} x {width}, want {round_up(rows, 128)} x {round_up(cols, 4)} for {rows} x {cols}"
        )
    tiles = swizzled.reshape(*swizzled.shape[:-2], height // 128, width // 4, 32, 4, 4)
    padded = tiles.transpose(-3, -2).movedim(-4, -2).reshape(swizzled.shape)
    return padded[..., :rows, :cols]


def _given(scale: Tensor | None) -> str:
    return "missing" if scale is None else "given"


def _in_groups(weight: Tensor, group: int) -> Tensor:
    if weight.shape[-1] % group:
        raise InputError(f"weight: got {weight.shape[-1]} columns, want a multiple of {group}, the block size")
    return finite("weight", weight)


def _of_rows(name: str, scale: Tensor, experts: int, rows: int) -> Tensor:
    """One scale a stacked matrix, [E, n] -> one a row, [E, rows, 1] float64."""
    check(name, scale, (experts, -1), torch.float32)
    return spread(scale[..., None], (experts, rows, 1), (0, 0), scale.shape[1])
