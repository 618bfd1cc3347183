"""Compile every kernel for every supported GPU on a machine that has none, and refuse spills.

    python ci/aot.py

Arguments are specialised as a launch would: an int of 1 is a constant, multiples of 16 are known as such. Prints one
line a kernel, shape and target; exits 1 if one does not compile, spills, or loads narrower than it should.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_conformance.kernels import launch
from moe_conformance.kernels.capture import capture_blocks, capture_kernel
from moe_conformance.kernels.padding import resize_blocks, resize_kernel
from moe_conformance.kernels.routing import route_blocks, route_kernel

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("cuda", 120, 32),
    GPUTarget("hip", "gfx942", 64),
    GPUTarget("hip", "gfx950", 64),
)
# Shared memory of one block on the smallest of the targets (sm_120).
SHARED_LIMIT = 99 * 1024


@dataclass(frozen=True)
class Shape:
    """A kernel at the arguments of a real launch. vector: bytes that its widest global access must have."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    numbers: dict[str, int]
    constants: dict[str, Any] = field(default_factory=dict)
    vector: int = 0


def route_shape(
    model: str, dtype: str, tokens: int, experts: int, top_k: int, stride: int, gemma4: bool = False
) -> Shape:
    numbers = {"tokens": tokens, "experts": experts, "stride_lt": experts * stride, "stride_le": stride, "stride_se": 1}
    constants = {
        "TOP_K": top_k,
        "RENORMALIZE": True,
        "HAS_SCALE": gemma4,
        **route_blocks(tokens, experts, top_k, False),
    }
    pointers = {"logits_ptr": dtype, "scale_ptr": dtype, "ids_ptr": "i32", "weights_ptr": "fp32"}
    return Shape(f"route {model} {dtype} E{experts} K{top_k}", route_kernel, pointers, numbers, constants)


def resize_shape(what: str, element: str, rows: int, source: int, columns: int, width: int, vector: int) -> Shape:
    numbers = {"rows": rows, "columns": columns, "width": width, "fill": 0, "stride_xr": source, "stride_xc": 1}
    blocks = resize_blocks(rows, width, False)
    pointers = {"x_ptr": element, "out_ptr": element}
    return Shape(f"{what} {element} {source} to {width}", resize_kernel, pointers, numbers, blocks, vector)


def capture_shape(ids: str, buffer: str, count: int, layers: int, experts: int, top_k: int, write: bool) -> Shape:
    numbers = {"start": 0, "count": count, "layer_id": 0, "top_k": top_k, "experts": experts, "stride_ir": top_k}
    numbers |= {"stride_ik": 1, "stride_bt": layers * top_k, "stride_bl": top_k, "stride_bk": 1}
    constants = {"WRITE": write, **capture_blocks(count, top_k, False)}
    pointers = {"ids_ptr": ids, "buffer_ptr": buffer, "rejected_ptr": "i32"}
    name = f"capture {ids} to {buffer} {count} rows{'' if write else ', check'}"
    return Shape(name, capture_kernel, pointers, numbers, constants)


SHAPES = (
    route_shape("Gemma 4", "bf16", 64, 128, 8, 1, gemma4=True),
    route_shape("Qwen3-30B", "fp32", 4096, 128, 8, 1),
    route_shape("Qwen2-57B", "fp16", 63, 60, 4, 3),
    route_shape("Mixtral", "fp32", 1, 8, 2, 1),
    route_shape("Nemotron-3-Super", "bf16", 64, 512, 22, 1),
    route_shape("the limits", "fp32", 64, 1024, 32, 1, gemma4=True),
    resize_shape("pad", "i16", 4096, 2688, 2688, 2816, 16),
    resize_shape("unpad", "i16", 4096, 2816, 2688, 2688, 16),
    resize_shape("pad", "i8", 63, 2687, 2687, 2816, 0),
    capture_shape("i32", "i32", 64, 48, 128, 8, True),
    capture_shape("i64", "i16", 4096, 48, 512, 22, True),
    capture_shape("i64", "u8", 4096, 48, 128, 8, False),
)


def source(shape: Shape) -> ASTSource:
    """The specialisation that a launch with these arguments would compile."""
    signature: dict[str, str] = {}
    constants = dict(shape.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(shape.kernel.params):
        name = parameter.name
        if name in shape.pointers:
            signature[name] = "*" + shape.pointers[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in shape.numbers:
            number = shape.numbers[name]
            signature[name] = "i32" if abs(number) < 2**31 else "i64"
            if not parameter.do_not_specialize and number == 1:
                signature[name], constants[name] = "constexpr", 1
            elif not parameter.do_not_specialize and number % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
    return ASTSource(shape.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Quality:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    vector_bytes: int


def quality(compiled: Any, target: GPUTarget) -> Quality:
    """Read from the assembly of AMD, and with the cuobjdump of triton's wheel from the binary of NVIDIA."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def entry(key: str) -> int:
            return int(re.search(rf"\.{key}: +(\d+)", text)[1])

        spilled = 4 * (entry("vgpr_spill_count") + entry("sgpr_spill_count")) + entry("private_segment_fixed_size")
        words = [int(n or 1) for n in re.findall(r"(?:global|buffer)_(?:load|store)_dword(?:x(\d))?\b", text)]
        return Quality(entry("vgpr_count"), spilled, compiled.metadata.shared, 4 * max(words, default=0))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    accesses = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    vector = max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)
    return Quality(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, vector)


def faults(shape: Shape, found: Quality) -> list[str]:
    complaints = []
    if found.spilled_bytes:
        complaints.append(f"spills {found.spilled_bytes} bytes, want 0; make its tile smaller")
    if found.shared_bytes > SHARED_LIMIT:
        complaints.append(f"takes {found.shared_bytes} bytes of shared memory, want at most {SHARED_LIMIT}")
    if found.vector_bytes < shape.vector:
        complaints.append(f"widest access is {found.vector_bytes} bytes, want {shape.vector}")
    return complaints


def main() -> int:
    if launch.interpreted():
        print("TRITON_INTERPRET is set: got interpreted kernels, want compilable ones; unset it", file=sys.stderr)
        return 1
    failures, start = [], time.perf_counter()
    print(
        f"triton {triton.__version__}\n"
        f"{'kernel':44}{'target':>10}{'regs':>6}{'spill':>7}{'shared':>8}{'vector':>8}{'s':>7}"
    )
    for shape in SHAPES:
        for target in TARGETS:
            arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
            began = time.perf_counter()
            try:
                found = quality(triton.compile(source(shape), target, {"enable_fp_fusion": True}), target)
                problems = faults(shape, found)
                row = f"{found.registers:6}{found.spilled_bytes:7}{found.shared_bytes:8}{found.vector_bytes:8}"
            except Exception as error:  # a compiler's errors have no common base; every one is a failure here
                problems, row = [f"{type(error).__name__}: {error}"], "   did not compile"
            print(f"{shape.name:44}{arch:>10}{row}{time.perf_counter() - began:7.2f}", flush=True)
            failures += [f"{shape.name}, {arch}: {problem}" for problem in problems]
    print(f"{len(SHAPES) * len(TARGETS)} compiled in {time.perf_counter() - start:.0f} s, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        # A cached kernel would say nothing about this compiler.
        triton.knobs.cache.dir = cache
        sys.exit(main())
