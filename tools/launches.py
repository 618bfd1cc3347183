"""Records what launches of kernels would compile, on a machine without a GPU.

The launchers run unchanged on meta tensors, and Triton specialises their arguments itself. Its hook before compilation
records what would be compiled, and stops there. So no list of arguments is written down twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one of its multiprocessors holds at once.

    block_memory: bytes of shared memory that a block may have; reserved: that each has besides. registers: of 32 bits.
    Sources: CUDA programming guide, compute capabilities; AMD CDNA 3 and CDNA 4 instruction set architecture.
    """

    name: str
    gpu: GPUTarget
    block_memory: int
    memory: int
    reserved: int = 1024
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    @property
    def amd(self) -> bool:
        return bool(self.gpu.backend == "hip")

    # What Triton asks the driver of a device for before it compiles.
    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


KIB = 1024
# Four SIMDs of 512 registers for each of 64 lanes, with at most 8 waves each.
CDNA = {"reserved": 0, "registers": 4 * 512 * 64, "threads": 4 * 8 * 64}
TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB),
    Target("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB),
    Target("sm_120", GPUTarget("cuda", 120, 32), 99 * KIB, 100 * KIB, threads=1536, blocks=24),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, **CDNA),
    Target("gfx950", GPUTarget("hip", "gfx950", 64), 160 * KIB, 160 * KIB, **CDNA),
)


@dataclass(frozen=True)
class Launch:
    """One kernel as one launch would compile it. specialization: Triton's own record of it, JSON."""

    shape: str
    target: Target
    module: str
    kernel: str
    specialization: str

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.specialization)
        return record

    @property
    def constants(self) -> dict[str, Any]:
        record = self.record
        names = list(record["signature"])
        keys = record["constant_keys"]
        return {names[path[0]]: value for path, value in zip(keys, record["constant_vals"], strict=True)}

    @property
    def name(self) -> str:
        """Of the launcher, where one kernel has two."""
        if self.kernel == "grouped_matmul_kernel":
            return "down" if self.constants["ACTIVATION"] == "no" else "gate_up"
        if self.kernel == "capture_kernel" and not self.constants["WRITE"]:
            return "capture check"
        return self.kernel.removesuffix("_kernel")

    @property
    def warps(self) -> int:
        return int(self.record["options"]["num_warps"])

    @property
    def tile(self) -> str:
        """Rows, columns and depth of a product; warps and stages."""
        sizes = [str(self.constants[size]) for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if "BLOCK_M" in self.constants]
        if not sizes:
            return f"{self.warps} warps"
        return f"{' x '.join(sizes)}, {self.warps} warps, {self.record['options']['num_stages']} stages"


def recorded(shape: str, target: Target, run: Callable[[Target], object]) -> list[Launch]:
    """The launches that `run` would make on the target, in order."""
    launches: list[Launch] = []

    def keep(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        launches.append(Launch(shape, target, fn.module, fn.jit_function.__name__, compile["specialization_data"]))
        return True  # as if it were compiled elsewhere

    triton.runtime.driver.set_active(target)
    with triton.knobs.runtime.scope(), torch.device("meta"):
        triton.knobs.runtime.jit_cache_hook = keep
        run(target)
    return launches
