"""What every kernel here needs to run in three modes: compiled, interpreted on a CPU, compiled ahead of time.

The interpreter is chosen by TRITON_INTERPRET=1, which must be in the environment before triton is imported. Its
bfloat16 arithmetic works on raw bits and is wrong, so kernels handle bfloat16 only in `widened`, `operand` and
`rounded`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.errors import InputError


@triton.jit
def widened(x):
    """bfloat16 as float32, by its bits: Triton 3.9's interpreter flushes subnormals in its own conversion."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_float32(ptr, mask):
    """Load as float32, 0 where masked."""
    return widened(tl.load(ptr, mask=mask, other=0.0)).to(tl.float32)


INTERPRETED = tl.constexpr(not isinstance(load_float32, triton.JITFunction))


@triton.jit
def operand(x):
    """x as tl.dot takes it: as it is; interpreted, bfloat16 as float32, in which its products are exact."""
    if INTERPRETED:
        x = widened(x)
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, ties to even.

    Values must be rounded before tl.store, which truncates bfloat16 when interpreted.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        half = ((bits >> 16) & 1) + 0x7FFF  # just below one half of the last place, or one half where it is odd
        bits = tl.where(x == x, bits + half, 0x7FC00000) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def local_expert(ids_ptr, pair, mask, map_ptr, experts, HAS_MAP: tl.constexpr):
    """int32 local expert of each pair, -1 if no expert of this rank takes it.

    That is so for an id outside [0, experts) and, with a map, for another rank's expert; neither is used as an index.
    map_ptr: [experts] int32, local ids in [0, experts).
    """
    expert = tl.load(ids_ptr + pair, mask=mask, other=-1)
    named = mask & (expert >= 0) & (expert < experts)
    if HAS_MAP:
        expert = tl.load(map_ptr + expert, mask=named, other=-1)
        named = named & (expert >= 0) & (expert < experts)
    return tl.where(named, expert, -1).to(tl.int32)


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter; decided when triton was imported."""
    return bool(INTERPRETED.value)


def require_device(**tensors: Tensor | None) -> None:
    """Raise InputError unless all tensors are on one device that this process's kernels can run on."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise InputError(f"{name}: got device {tensor.device}, want {first.device}, where {first_name} is")
    if (first.device.type == "cpu") != interpreted():
        mode, want = ("interpreted", "cpu") if interpreted() else ("compiled", "a GPU")
        raise InputError(
            f"{first_name}: got device {first.device}, want {want}: kernels are {mode} in this process, which "
            "TRITON_INTERPRET=1, set before triton is imported, decides"
        )
