"""Compiles a recorded launch, and reads figures from its binary without running it."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from launches import Launch, Target


@dataclass(frozen=True)
class Figures:
    """registers: of a thread. spilled: bytes of local memory, of a thread. shared: bytes of a block. blocks: that one
    multiprocessor holds at once. instructions: of the program. matrix: of those, of the matrix unit named by unit.
    wide_loads, wide_stores: of 16 bytes, of all loads and stores of global memory."""

    registers: int
    spilled: int
    shared: int
    blocks: int
    instructions: int
    unit: str
    matrix: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int


def compiled(launch: Launch) -> Any:
    """Triton's kernel, from its own record of the launch."""
    triton.runtime.driver.set_active(launch.target)
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    return kernel.preload(launch.specialization)


def figures(launch: Launch) -> Figures:
    kernel = compiled(launch)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    if launch.target.amd:
        return _amd(kernel.asm["amdgcn"], launch.target, warps, shared)
    return _nvidia(kernel.asm["cubin"], launch.target, warps, shared)


def resident(target: Target, registers: int, warps: int, shared: int) -> int:
    """Blocks that a multiprocessor holds; registers go to a warp eight a lane at a time."""
    threads = warps * target.gpu.warp_size
    of_block = -(-registers // 8) * 8 * threads
    by_memory = target.memory // max(1, shared + target.reserved)
    return int(min(target.registers // of_block, target.threads // threads, by_memory, target.blocks))


def _nvidia(cubin: bytes, target: Target, warps: int, shared: int) -> Figures:
    """From the cuobjdump in Triton's wheel; shared memory is given at launch, so the binary does not show it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        arguments = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    program = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text)
    matrix = [name.split(".")[0] for name in program if re.match(r"(HG|H|Q|UTC\w*)MMA", name)]
    loads = [name for name in program if re.match(r"LDG(STS)?\b", name)]
    stores = [name for name in program if re.match(r"STG\b", name)]
    return Figures(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        blocks=resident(target, usage["REG"], warps, shared),
        instructions=len(program),
        unit=" ".join(sorted(set(matrix))) or "no",
        matrix=len(matrix),
        wide_loads=sum(".128" in name for name in loads),
        loads=len(loads),
        wide_stores=sum(".128" in name for name in stores),
        stores=len(stores),
    )


def _amd(text: str, target: Target, warps: int, shared: int) -> Figures:
    def entry(key: str) -> int:
        return int(re.findall(rf"\.{key}: +(\d+)", text)[0])

    program = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    matrix = sum(name.startswith("v_mfma") for name in program)
    loads = [name for name in program if re.match(r"(global|buffer|flat)_load", name)]
    stores = [name for name in program if re.match(r"(global|buffer|flat)_store", name)]
    # Spilled scalars lie in lanes of vector registers, which are counted.
    return Figures(
        registers=entry("vgpr_count"),
        spilled=max(entry("private_segment_fixed_size"), 4 * entry("vgpr_spill_count")),
        shared=shared,
        blocks=resident(target, entry("vgpr_count"), warps, shared),
        instructions=len(program),
        unit="v_mfma" if matrix else "no",
        matrix=matrix,
        wide_loads=sum("dwordx4" in name for name in loads),
        loads=len(loads),
        wide_stores=sum("dwordx4" in name for name in stores),
        stores=len(stores),
    )
