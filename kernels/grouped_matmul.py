"""The two projections of all experts as grouped matrix products. Twin of reference_impl/grouped_matmul.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec
from moe_conformance.errors import InputError
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.kernels.grouped_kernel import Dispatched, launch_grouped_matmul
from moe_conformance.kernels.tuning import Tile
from moe_conformance.reference_impl.quantised.tiles import scale_shape


def gate_up(
    x: Tensor,
    w: Tensor,
    spec: MLPSpec,
    dispatched: Dispatched,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    quantised: Quantised | None = None,
    interleaved: bool = False,
) -> Tensor:
    """What enters w2, activation and all: row t K + k of pair (t, k) of x [T, D]. returns [T K, F] in x's dtype.

    x: float32, float16 or bfloat16 of any strides. w: [E, 2F, D'] of any strides, gate above up, or gate and up in
    turn where interleaved, or [E, F, D'] without a gate; D' >= D, and what lies behind column D is never read. In x's
    dtype, or float8_e4m3fn with scales. bias: [E, 2F] or [E, F]. weights: [T, K] float32, read where spec.weight_on is
    "input" or "w2_input". Rows of pairs that no expert takes are not written. Sums are float32.
    Raises InputError for shapes and dtypes.
    """
    top_k = dispatched.ids.shape[1]
    _check(x, w, bias, quantised, dispatched, top_k, 2 if spec.gated else 1, interleaved)
    return launch_grouped_matmul(
        x,
        w,
        bias,
        dispatched,
        tile,
        spec=spec,
        quantised=quantised,
        pairs_per_row=top_k,
        interleaved=interleaved,
        weights=weights,
        weight_on=spec.weight_on,
    )


def down(
    hidden: Tensor,
    w: Tensor,
    dispatched: Dispatched,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    quantised: Quantised | None = None,
) -> Tensor:
    """Each pair's own expert output, without its weight. hidden: [T K, F], w: [E, D, F'] and bias [E, D] as above.

    returns [T K, D] in hidden's dtype; rows of pairs that no expert takes are not written.
    """
    _check(hidden, w, bias, quantised, dispatched)
    return launch_grouped_matmul(hidden, w, bias, dispatched, tile, spec=None, quantised=quantised, pairs_per_row=1)


def _check(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    quantised: Quantised | None,
    dispatched: Dispatched,
    pairs_per_row: int = 1,
    halves: int = 1,
    interleaved: bool = False,
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"x: got {x.dtype} {list(x.shape)}, want [rows, D] of float32, float16 or bfloat16")
    dtype = x.dtype if quantised is None else torch.float8_e4m3fn
    if w.ndim != 3 or w.dtype != dtype or w.shape[1] % halves or w.shape[2] < x.shape[1]:
        want = f"{dtype} [E, {'2 F' if halves == 2 else 'rows'}, at least {x.shape[1]}]"
        raise InputError(f"w: got {w.dtype} {list(w.shape)}, want {want}, as x and spec have it")
    if bias is not None and bias.shape != w.shape[:2]:
        raise InputError(f"bias: got shape {list(bias.shape)}, want {list(w.shape[:2])}, one a row of w")
    pairs = dispatched.ids.numel()
    if len(x) * pairs_per_row != pairs:
        raise InputError(
            f"x: got {len(x)} rows, want {pairs // pairs_per_row}, one for {pairs_per_row} of {pairs} pairs"
        )
    if quantised is None:
        return
    if interleaved:
        raise InputError("w: got interleaved float8 rows, want gate above up: a scale belongs to rows side by side")
    columns = quantised.tile[1]
    if columns % 16 and columns < w.shape[2]:
        raise InputError(f"quantised: got scales for {columns} columns each, want a multiple of 16, or one for all")
    shape = (len(w), *scale_shape(w.shape[1], w.shape[2], quantised.tile, halves if quantised.stacked else 1))
    if quantised.scale.shape != shape or not quantised.scale.is_floating_point():
        got = f"{quantised.scale.dtype} {list(quantised.scale.shape)}"
        raise InputError(f"scale: got {got}, want float {list(shape)}, one a tile of {quantised.tile}")
