"""Padding and cutting keep every bit, at any width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poison_
from moe_conformance.kernels import padding
from moe_conformance.reference_impl import padding as reference_padding

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def test_resized_rows_keep_their_bits(device: str) -> None:
    dtypes = (torch.float64, *FLOATS, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8, torch.bool)
    for dtype in dtypes:
        x = normal((3, 5, 21), f"resize {dtype}", std=4.0).to(dtype).to(device)
        if dtype in FLOATS:
            x[0, 0, :3] = torch.tensor([NAN, -INF, -0.0])
        for name, view in (
            ("contiguous", x), ("rows", x[:, ::2]), ("columns", x[..., 1::3]), ("transposed", x.transpose(0, 2)),
        ):  # fmt: skip
            columns = view.shape[-1]
            padded = padding.pad(view, columns + 11, 3.0)
            filled = torch.full((*view.shape[:-1], 11), 3.0).to(dtype)
            compare.same(f"{name} {dtype}", padded.dtype, dtype)
            compare.equal(f"pad {name} {dtype}", _bits(padded[..., :columns]), _bits(view))
            compare.equal(f"fill {name} {dtype}", _bits(padded[..., columns:]), _bits(filled))
            compare.equal(f"unpad {name} {dtype}", _bits(padding.unpad(view, columns - 2)), _bits(view[..., :-2]))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


def test_resizing_is_the_reference_at_any_width(device: str) -> None:
    for rows, columns, width in ((1, 1, 2), (7, 20, 24), (5, 2688, 2816), (4, 1023, 1025), (3, 0, 5), (0, 4, 8)):
        x = normal((rows, columns), f"width {columns}").to(device)
        for fill in (0.0, -1.5, INF, NAN):
            compare.equal(f"pad to {width}", padding.pad(x, width, fill), reference_padding.pad(x, width, fill))
        wide = poison_(torch.empty(rows, width, device=device))
        wide[:, :columns] = x
        compare.equal(f"unpad to {columns}", padding.unpad(wide, columns), x)
    compare.refused("pad", lambda: padding.pad(torch.zeros(2, 9, device=device), 8), ("9", "8"))
    compare.refused("unpad", lambda: padding.unpad(torch.zeros(2, 8, device=device), 9), ("8", "9"))
