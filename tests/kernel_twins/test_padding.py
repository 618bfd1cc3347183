"""Padding and cutting keep every bit, at any width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poison_
from moe_conformance.kernels import padding
from moe_conformance.reference_impl import padding as reference_padding

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


EVERY = (torch.float64, *FLOATS, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8, torch.bool)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "rows": lambda x: x[:, ::2],
    "columns": lambda x: x[..., 1::3],
    "transposed": lambda x: x.transpose(0, 2),
}


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_resized_rows_keep_their_bits(device: str, view: str, dtype: torch.dtype) -> None:
    x = normal((3, 5, 21), f"resize {dtype}", std=4.0).to(dtype).to(device)
    if dtype in FLOATS:
        x[0, 0, :3] = torch.tensor([NAN, -INF, -0.0])
    x = VIEWS[view](x)
    columns = x.shape[-1]
    padded = padding.pad(x, columns + 11, 3.0)
    filled = torch.full((*x.shape[:-1], 11), 3.0).to(dtype)
    compare.same("dtype", padded.dtype, dtype)
    compare.equal("pad", _bits(padded[..., :columns]), _bits(x))
    compare.equal("fill", _bits(padded[..., columns:]), _bits(filled))
    compare.equal("unpad", _bits(padding.unpad(x, columns - 2)), _bits(x[..., :-2]))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


SIZES = ((1, 1, 2), (7, 20, 24), (5, 2688, 2816), (4, 1023, 1025), (3, 0, 5), (0, 4, 8))


@pytest.mark.parametrize("rows, columns, width", SIZES)
def test_resizing_is_the_reference_at_any_width(device: str, rows: int, columns: int, width: int) -> None:
    x = normal((rows, columns), f"width {columns}").to(device)
    for fill in (0.0, -1.5, INF, NAN):
        compare.equal(f"filled with {fill}", padding.pad(x, width, fill), reference_padding.pad(x, width, fill))
    wide = poison_(torch.empty(rows, width, device=device))
    wide[:, :columns] = x
    compare.equal("unpad", padding.unpad(wide, columns), x)


def test_resizing_the_wrong_way_is_refused(device: str) -> None:
    compare.refused("pad", lambda: padding.pad(torch.zeros(2, 9, device=device), 8), ("9", "8"))
    compare.refused("unpad", lambda: padding.unpad(torch.zeros(2, 8, device=device), 9), ("8", "9"))
