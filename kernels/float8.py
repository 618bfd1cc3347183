"""float8 weights in a product: loaded in the dtype of the other side, exactly; their scales are for the sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.engine import MLPSpec, QuantSpec
from moe_conformance.errors import Unsupported
from moe_conformance.kernels.launch import interpreted, rounded


@triton.jit
def load_fp8(ptr, mask, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """e4m3fn weights, stored as uint8 unless NATIVE, in dtype; 0 where masked.

    By bits where the target has no such dtype (sm_80, gfx942, the interpreter): the seven bits below the sign, moved to
    where float32 has them, are the value times 2^-120, subnormals included.
    """
    if NATIVE:
        value = tl.load(ptr, mask=mask, other=0.0)
    else:
        code = tl.load(ptr, mask=mask, other=0).to(tl.int32)
        value = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * (2.0**120)
        value = rounded(tl.where((code & 0x7F) == 0x7F, float("nan"), value), dtype)
    return value.to(dtype)


@dataclass(frozen=True)
class Quantised:
    """float8_e4m3fn weights [E, rows, columns], each tile (rows, columns; 0 for all there are) with a scale of its own.

    scale: [E, down, across] float. stacked: tiles of w13 end at the seam of gate and up, as `dequantise_fp8` takes
    them; otherwise they go over it, and a tile of all rows has one scale for both.
    """

    scale: Tensor
    tile: tuple[int, int] = (128, 128)
    stacked: bool = True


def quantised_of(quant: QuantSpec, mlp: MLPSpec, tensors: Mapping[str, Tensor]) -> dict[str, Quantised]:
    """The scales of `QuantSpec.tensors` by part, "w13" or "w1" and "w2", as `routed_experts` takes them.

    Raises Unsupported for what the kernels do not read: any format but fp8_e4m3, zero points, quantised activations,
    groups that are no multiple of 16 columns.
    """
    if quant.format != "fp8_e4m3" or quant.zero_points:
        what = f"{quant.format}{' with zero points' if quant.zero_points else ''}"
        raise Unsupported(f"quant: got {what}, want fp8_e4m3: the kernels load no other codes")
    if quant.activations != "no":
        raise Unsupported(f"quant.activations: got {quant.activations}, want no: the kernels quantise none")
    found = {}
    for part in ("w13" if mlp.gated else "w1", "w2"):
        scale, halves = tensors[f"experts.{part}.scale"], quant.split_gate_up and part == "w13"
        stacked = False
        match quant.granularity:
            case "tensor":
                tile, stacked = (0, 0), halves
                scale = scale.reshape(len(scale), -1, 1)
            case "channel":
                tile, scale = (1, 0), scale[..., None]
            case "block":
                tile, stacked = quant.block, halves
            case "group":
                tile = (1, quant.group)
        if tile[1] % 16:
            raise Unsupported(f"quant: got scales for {tile[1]} columns each, want a multiple of 16, as tiles are")
        found[part] = Quantised(scale, tile, stacked)
    return found


def native_fp8(x: Tensor) -> bool:
    """Whether the target compiled for where x is converts e4m3fn in hardware: from sm_89 on, AMD's from gfx950 on."""
    if interpreted():
        return False
    with torch.cuda.device_of(x):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return bool(target.arch.startswith(("gfx950", "gfx12")))
    return bool(target.arch >= 89)
