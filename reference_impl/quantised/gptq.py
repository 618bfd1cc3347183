"""GPTQ and AWQ: 4-bit codes in int32 words, outputs last, with scales and zero points of groups of inputs.

            qweight                              qzeros                               zero
GPTQ        [E, cols / 8, rows], eight inputs    [E, groups, rows / 8], eight outputs one less, or itself (v2)
AWQ         [E, cols, rows / 8], eight outputs   [E, groups, rows / 8], eight outputs itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.quote import quoted
from moe_conformance.reference_impl.quantised.integers import (
    SCALES,
    check_bits,
    dequantise_groups,
    group_count,
    pack,
    quantise_groups,
    unpack,
)
from moe_conformance.reference_impl.quantised.tiles import check

# Of a word's nibbles from the lowest: the column, of its eight, that each holds. AutoAWQ's "gemm" kernels.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class GPTQ(NamedTuple):
    """qweight, qzeros int32, scales and g_idx of one fused weight."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def dequantise_gptq(
    qweight: Tensor,
    scales: Tensor,
    *,
    qzeros: Tensor,
    group: int,
    checkpoint_format: Literal["gptq", "gptq_v2"],
    desc_act: bool = False,
    g_idx: Tensor | None = None,
    bits: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """GPTQ, https://arxiv.org/abs/2210.17323, in AutoGPTQ's layout.

    qweight: [E, cols bits / 32, rows] int32. scales: [E, groups, rows]. qzeros: [E, groups, rows bits / 32] int32;
    "gptq" stores zero - 1, "gptq_v2" the zero. group: columns a group, -1 for all.
    g_idx: [E, cols] integer, the group of each column: needed with desc_act, where columns of a group do not lie
    together (act-order); otherwise taken where given. returns [E, rows, cols].
    Raises InputError for other shapes and dtypes, a missing g_idx, a group that does not divide the columns, and a
    stored 15 in "gptq": the zero is 16 in AutoGPTQ's qlinear_cuda, 0 in its qlinear_cuda_old, and GPTQModel carries.
    """
    check("qweight", qweight, (-1, -1, -1), torch.int32)
    experts, words, rows = qweight.shape
    cols = words * 32 // check_bits(bits)
    groups = group_count(cols, group)
    check("scales", scales, (experts, groups, rows), *SCALES)
    check("qzeros", qzeros, (experts, groups, rows * bits // 32), torch.int32)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format: got {quoted(checkpoint_format)}, want gptq or gptq_v2")
    if desc_act and g_idx is None:
        raise InputError("g_idx: got None, want [E, cols]: with desc_act, columns of a group do not lie together")
    zeros = unpack(qzeros, 2, bits)
    if checkpoint_format == "gptq":
        zeros = zeros + 1
        if (zeros == 2**bits).any():
            raise InputError(f"qzeros: got a stored {2**bits - 1}, which engines read differently; store as gptq_v2")
    return dequantise_groups(unpack(qweight, 1, bits).mT, zeros.mT, scales.mT, g_idx, dtype)


def quantise_gptq(
    weight: Tensor,
    *,
    group: int,
    checkpoint_format: Literal["gptq", "gptq_v2"],
    g_idx: Tensor | None = None,
    bits: int = 4,
) -> GPTQ:
    """[E, rows, cols] rounded to the nearest codes, in the layout of `dequantise_gptq`; rows and cols whole words."""
    offset = 1 if checkpoint_format == "gptq" else 0
    codes, zeros, scales, g_idx = quantise_groups(weight, group, g_idx, bits, words=(1, 2), least_zero=offset)
    qweight, qzeros = pack(codes, 2, bits), pack(zeros - offset, 1, bits)
    return GPTQ(qweight.mT.contiguous(), qzeros.mT.contiguous(), scales.mT.contiguous(), g_idx)


def dequantise_awq(
    qweight: Tensor, scales: Tensor, *, qzeros: Tensor, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """AWQ, https://arxiv.org/abs/2306.00978, 4 bits, version "gemm".

    qweight: [E, cols, rows / 8] int32; a word holds eight outputs, its nibbles from the lowest in AWQ_ORDER.
    scales: [E, groups, rows]. qzeros: [E, groups, rows / 8] int32, packed alike. group: inputs a group, -1 for all.
    returns [E, rows, cols]. Raises InputError for other shapes and dtypes, and a group that does not divide cols.
    """
    check("qweight", qweight, (-1, -1, -1), torch.int32)
    experts, cols, words = qweight.shape
    groups = group_count(cols, group)
    check("scales", scales, (experts, groups, words * 8), *SCALES)
    check("qzeros", qzeros, (experts, groups, words), torch.int32)
    codes, zeros = (_reordered(unpack(tensor, 2), _INVERSE_ORDER) for tensor in (qweight, qzeros))
    return dequantise_groups(codes.mT, zeros.mT, scales.mT, None, dtype)


def quantise_awq(weight: Tensor, *, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """[E, rows, cols] -> qweight, scales and qzeros as in `dequantise_awq`; rows a multiple of 8."""
    codes, zeros, scales, _ = quantise_groups(weight, group, None, 4, words=(1,))
    qweight, qzeros = (pack(_reordered(tensor.mT, AWQ_ORDER), 2) for tensor in (codes, zeros))
    return qweight, scales.mT, qzeros


_INVERSE_ORDER = tuple(AWQ_ORDER.index(column) for column in range(8))


def _reordered(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Every eight along the last dim in this order."""
    eights: Tensor = codes.unflatten(-1, (-1, 8))
    return eights[..., list(order)].flatten(-2)
