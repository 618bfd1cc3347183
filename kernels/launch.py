"""What every kernel here needs to run in its three modes: compiled, interpreted on a CPU, ahead of time.

The interpreter is chosen by TRITON_INTERPRET=1, which must be in the environment before triton is imported.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_conformance.errors import InputError


@triton.jit
def load_float32(ptr, mask):
    """Load as float32, 0 where masked.

    bfloat16 is widened by its bits: Triton 3.9's interpreter flushes subnormals in its own conversion.
    """
    x = tl.load(ptr, mask=mask, other=0.0)
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter; decided when triton was imported."""
    return not isinstance(load_float32, triton.JITFunction)


def require_device(**tensors: Tensor) -> None:
    """Raise InputError unless all tensors are on one device that this process's kernels can run on."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise InputError(f"{name}: got device {tensor.device}, want {first.device}, where {first_name} is")
    if (first.device.type == "cpu") != interpreted():
        mode, want = ("interpreted", "cpu") if interpreted() else ("compiled", "a GPU")
        raise InputError(
            f"{first_name}: got device {first.device}, want {want}: kernels are {mode} in this process, which "
            "TRITON_INTERPRET=1, set before triton is imported, decides"
        )
