"""Padding and cutting of the last dim in one launch each. Twin of reference_impl/padding.py."""

from __future__ import annotations

import math
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted, require_device
from moe_conformance.reference_impl.operators import operator

# Rows are copied as integers of their size, so every dtype keeps its bits in all three modes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["rows", "fill"])
def resize_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    width,
    fill,
    stride_xr,
    stride_xc,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [rows, width] = the first `columns` columns of x, then `fill`. columns <= width."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r = offs_r[:, None] < rows
    mask_x = offs_c[None, :] < columns
    x = tl.load(x_ptr + offs_r[:, None] * stride_xr + offs_c[None, :] * stride_xc, mask=mask_r & mask_x, other=0)
    out = tl.where(mask_x, x, fill.to(x.dtype))
    tl.store(out_ptr + offs_r[:, None] * width + offs_c[None, :], out, mask=mask_r & (offs_c[None, :] < width))


def resize_blocks(rows: int, width: int, interpret: bool) -> dict[str, int]:
    """Tile sizes. Compiled: 16 bytes a thread and load for two-byte elements, 4 rows in flight."""
    block_c = min(triton.next_power_of_2(width), 1024)
    block_r = min(triton.next_power_of_2(rows), 65536 // block_c if interpret else 4)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c}


def _bits_of(fill: int | float, dtype: torch.dtype, integer: torch.dtype) -> int:
    exact = torch.float64 if isinstance(fill, float) else torch.int64
    # On the CPU, whatever the default device is: reading the number from another device would wait for it.
    return int(torch.tensor([fill], dtype=exact, device="cpu").to(dtype).view(integer))


def _resize(x: Tensor, columns: int, width: int, fill: int | float) -> Tensor:
    """A new contiguous tensor [..., width]: `columns` columns of x, then `fill`."""
    require_device(x=x)
    integer = _BITS.get(x.element_size())
    if integer is None or x.is_complex():
        raise InputError(f"x: got {x.dtype}, want a real dtype of 1, 2, 4 or 8 bytes")
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if out.numel():
        rows = math.prod(x.shape[:-1])
        source = x.view(integer).reshape(rows, x.shape[-1])
        blocks = resize_blocks(rows, width, interpreted())
        with torch.cuda.device_of(x):
            resize_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]), triton.cdiv(width, blocks["BLOCK_C"]))](
                source,
                out.view(integer),
                rows,
                columns,
                width,
                _bits_of(fill, x.dtype, integer),
                source.stride(0),
                source.stride(1),
                **blocks,
            )
    return out


def _fake(x: Tensor, width: int, fill: int | float = 0) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


_pad = operator(
    "pad(Tensor x, SymInt width, Scalar fill) -> Tensor",
    lambda x, width, fill: _resize(x, x.shape[-1], width, fill),
    _fake,
)
_unpad = operator("unpad(Tensor x, SymInt width) -> Tensor", lambda x, width: _resize(x, width, width, 0), _fake)


def pad(x: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Widen the last dim to `width`, the new columns holding `fill`. [..., D] -> [..., width].

    x: any real dtype, any strides, at least one dim. returns a new contiguous tensor, or x itself if it already has
    that width.
    Raises InputError if x is wider than `width`.
    """
    if x.ndim == 0 or width < x.shape[-1]:
        raise InputError(f"pad: got shape {list(x.shape)}, want a last dim of at most the padded width {width}")
    return x if width == x.shape[-1] else cast(Tensor, _pad(x, width, fill))


def unpad(x: Tensor, width: int) -> Tensor:
    """Keep the first `width` columns of the last dim; the others are never read.

    x and result as for `pad`. Raises InputError if x is narrower than `width`.
    """
    if x.ndim == 0 or width > x.shape[-1]:
        raise InputError(f"unpad: got shape {list(x.shape)}, want a last dim of at least the true width {width}")
    return x if width == x.shape[-1] else cast(Tensor, _unpad(x, width))
