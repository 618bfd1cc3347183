"""float8 weights in a product: loaded in the dtype of the other side, exactly; their scales are for the sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """float8_e4m3fn weights: scale [E, *scale_shape(rows, cols, tile, stacked)] float, as `dequantise_fp8` takes it."""

    scale: Tensor
    tile: tuple[int, int] = (128, 128)


def native_fp8(x: Tensor) -> bool:
    """Whether the target compiled for where x is converts e4m3fn in hardware: from sm_89 on, AMD's from gfx950 on."""
    if interpreted():
        return False
    with torch.cuda.device_of(x):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return bool(target.arch.startswith(("gfx950", "gfx12")))
    return bool(target.arch >= 89)
