"""Integer weights: int8 by channel, and codes of 2 to 8 bits in int32 words as compressed-tensors packs them.

w = (code - zero) * scale, zero and scale of the row and the column's group. rows are outputs and cols inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.quote import quoted
from moe_conformance.reference_impl.quantised.tiles import (
    PER_CHANNEL,
    Tile,
    check,
    finite,
    integer,
    pair,
    spread,
    tile_amax,
)

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def unpack(words: Tensor, dim: int, bits: int = 4) -> Tensor:
    """int32 words -> int64 codes in [0, 2^bits), 32 / bits times as many along `dim`, lowest bits first.

    Codes of 3, 5, 6 or 7 bits reach over the end of a word.
    """
    line = words.long().movedim(dim, -1) & 2**32 - 1
    word, shift = _starts(line.shape[-1] * 32 // check_bits(bits), bits, words.device)
    beyond = line[..., (word + 1).clamp(max=line.shape[-1] - 1)]
    codes: Tensor = (line[..., word] >> shift | beyond << 32 - shift) & 2**bits - 1
    return codes.movedim(-1, dim)


def pack(codes: Tensor, dim: int, bits: int = 4) -> Tensor:
    """The inverse of `unpack`; the last word is filled up with zeros."""
    line = codes.long().movedim(dim, -1)
    word, shift = _starts(line.shape[-1], check_bits(bits), codes.device)
    count = -(-line.shape[-1] * bits // 32)
    words = line.new_zeros((*line.shape[:-1], count + 1))
    words.index_add_(-1, word, line << shift & 2**32 - 1)
    words.index_add_(-1, word + 1, line >> 32 - shift)
    return words[..., :count].to(torch.int32).movedim(-1, dim).contiguous()


def _starts(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """In which word each code begins, and at which bit."""
    start = torch.arange(count, device=device) * bits
    return start // 32, start % 32


def check_bits(bits: int) -> int:
    """bits itself. Raises InputError for a width that no format has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"bits: got {quoted(bits)}, want 2 to 8")
    return bits


def dequantise_int8(
    weight: Tensor,
    scale: Tensor,
    *,
    tile: Tile = PER_CHANNEL,
    stacked: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """weight * scale. weight: [E, rows, cols] int8. scale: [E, rows, 1] by channel; other tiles as for FP8."""
    check("weight", weight, (-1, -1, -1), torch.int8)
    return (weight.double() * spread(scale, weight.shape, tile, stacked)).to(dtype)


def quantise_int8(
    weight: Tensor, *, tile: Tile = PER_CHANNEL, stacked: int = 1, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric codes [E, rows, cols] in [-127, 127], nearest with ties to even, and their scales, float32.

    scale: given; without it each tile's largest magnitude over 127.
    """
    values = finite("weight", weight)
    if scale is None:
        scale = (tile_amax(values, tile, stacked) / 127).clamp(min=torch.finfo(torch.float32).tiny).float()
    return torch.round(values / spread(scale, values.shape, tile, stacked)).clamp(-127, 127).to(torch.int8), scale


def through_int8(x: Tensor, *, group: int = 0, scale: Tensor | None = None) -> Tensor:
    """What an int8 kernel sees of activations: quantised symmetrically and back, [T, cols] in x's dtype.

    A scale a token and group of `group` columns, computed from them; group 0: one a token. scale: a scalar, for all
    tokens.
    """
    tile = (1, group)
    if scale is not None:
        tile, scale = (0, 0), scale.reshape(1, 1, 1)
    codes, scale = quantise_int8(x[None], tile=tile, scale=scale)
    return dequantise_int8(codes, scale, tile=tile, dtype=x.dtype)[0]


def dequantise_packed(
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    weight_shape: Sequence[int] | Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    group: int,
    stacked: int = 1,
    bits: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """compressed-tensors' pack-quantized.

    weight_packed: [E, rows, ceil(cols bits / 32)] int32; a code is the value + 2^(bits - 1). weight_shape: (rows,
    cols). weight_scale: [E, rows, groups]. weight_zero_point: [E, ceil(rows bits / 32), groups] int32, coded alike;
    None is symmetric. With stacked matrices each has words of its own, stacked * ceil(rows / stacked bits / 32) of
    them. group: columns a group, -1 for all (by channel). weight_g_idx: [E, cols], as g_idx of GPTQ.
    returns [E, rows, cols]. Raises InputError for other shapes and dtypes, and a group that does not divide cols.
    """
    rows, cols = pair("weight_shape", weight_shape, 0)
    bits = check_bits(bits)
    check("weight_packed", weight_packed, (len(weight_scale), rows, -(-cols * bits // 32)), torch.int32)
    groups = group_count(cols, group)
    check("weight_scale", weight_scale, (-1, rows, groups), *SCALES)
    codes = unpack(weight_packed, 2, bits)[..., :cols]
    middle = torch.full_like(weight_scale, 2 ** (bits - 1), dtype=torch.int64)
    if weight_zero_point is None:
        return dequantise_groups(codes, middle, weight_scale, weight_g_idx, dtype)
    part = rows // integer("stacked", stacked, 1, max(rows, 1))
    words = -(-part * bits // 32)
    check("weight_zero_point", weight_zero_point, (len(weight_scale), stacked * words, groups), torch.int32)
    zeros = unpack(weight_zero_point.unflatten(1, (stacked, words)), 2, bits)[:, :, :part].flatten(1, 2)
    return dequantise_groups(codes, zeros, weight_scale, weight_g_idx, dtype)


def quantise_packed(
    weight: Tensor, *, group: int, g_idx: Tensor | None = None, stacked: int = 1, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """[E, rows, cols] -> weight_packed, weight_scale and weight_zero_point as in `dequantise_packed`."""
    codes, zeros, scales, _ = quantise_groups(weight, group, g_idx, bits, words=())
    parts = zeros.unflatten(1, (stacked, -1))
    return pack(codes, 2, bits), scales, pack(parts, 2, bits).flatten(1, 2)


def group_count(cols: int, group: int) -> int:
    """How many groups a row has. Raises InputError for a group that does not divide it."""
    if integer("group", group, -1) == 0 or (group != -1 and cols % group):
        raise InputError(f"group: got {group}, want -1 or a divisor of the {cols} columns")
    return 1 if group == -1 else cols // group


def _group_of_column(like: Tensor, groups: int, g_idx: Tensor | None) -> Tensor:
    """The group of each element of [E, rows, cols], as an index."""
    experts, _, cols = like.shape
    if g_idx is None:
        return (torch.arange(cols, device=like.device) // (cols // groups)).expand(like.shape)
    check("g_idx", g_idx, (experts, cols), torch.int32, torch.int64)
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise InputError(f"g_idx: got {int(g_idx.min())} to {int(g_idx.max())}, want 0 to {groups - 1}")
    return g_idx.long()[:, None].expand(like.shape)


def dequantise_groups(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(code - zero) * scale. codes: [E, rows, cols]; zeros, scales: [E, rows, groups]; g_idx: [E, cols] or None."""
    index = _group_of_column(codes, scales.shape[-1], g_idx)
    return ((codes - zeros.gather(-1, index)).double() * scales.double().gather(-1, index)).to(dtype)


def quantise_groups(
    weight: Tensor, group: int, g_idx: Tensor | None, bits: int, words: Sequence[int], least_zero: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [E, rows, cols], zeros [E, rows, groups] int64, scales float16, and g_idx [E, cols] int32.

    A group spans from its least to its largest value, 0 included; zeros are at least least_zero. words: the dims of
    weight that must be whole words.
    """
    values = finite("weight", weight)
    experts, rows, cols = values.shape
    groups = group_count(cols, group)
    for dim in words:
        if values.shape[dim] * bits % 32:
            raise InputError(f"weight: got {list(values.shape)}, want dim {dim} a multiple of {32 // bits}")
    index = _group_of_column(values, groups, g_idx)
    ends = values.new_zeros(experts, rows, groups)
    low, high = ends.scatter_reduce(-1, index, values, "amin"), ends.scatter_reduce(-1, index, values, "amax")
    top = 2**bits - 1
    scales = ((high - low) / top).half().clamp(min=torch.finfo(torch.float16).tiny)
    zeros = torch.round(-low / scales.double()).clamp(least_zero, top)
    codes = torch.round(values / scales.double().gather(-1, index) + zeros.gather(-1, index)).clamp(0, top)
    return codes.long(), zeros.long(), scales, index[:, 0].to(torch.int32)
