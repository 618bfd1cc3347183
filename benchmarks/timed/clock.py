"""Time of a call on the device, and what the device reaches at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import triton
from floors import Rates
from triton.testing import do_bench, do_bench_cudagraph

# Median first, then how far a fifth of the measurements lie below and above.
QUANTILES = (0.5, 0.2, 0.8)


class Budget:
    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began


@contextlib.contextmanager
def recorded_clocks() -> Iterator[Callable[[], dict[str, Any]]]:
    """The device's clocks while something is timed, as the driver's tool says them twice a second beside it.

    Yields what reads them so far: MHz [least, median, most] of the readings at which the device was at work, or why
    there are none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ("--query-gpu=clocks.sm,clocks.mem,utilization.gpu", "--format=csv,noheader,nounits")
    process, missing = None, ""
    with tempfile.TemporaryFile("w+") as output:
        try:
            command = ["nvidia-smi", *query, f"--id={visible}", "--loop-ms=500"]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        except OSError as error:
            missing = f"nvidia-smi: {error.strerror}"

        def read() -> dict[str, Any]:
            text = os.pread(output.fileno(), 2**24, 0).decode()
            readings = [line.split(", ") for line in text.splitlines()]
            numbers = [tuple(map(int, words)) for words in readings if len(words) == 3 and "".join(words).isdigit()]
            busy = [(sm, memory) for sm, memory, utilization in numbers if utilization]
            if not busy:
                return {"note": missing or f"no reading of a device at work among {len(readings)} by nvidia-smi"}
            sm, memory = ([min(own), round(statistics.median(own)), max(own)] for own in zip(*busy, strict=True))
            return {"sm": sm, "memory": memory, "readings": len(busy)}

        try:
            yield read
        finally:
            if process:
                process.kill()
                process.wait()


class Rotating:
    """A call that takes the next copy of its inputs each time, so that none finds its own in the cache."""

    def __init__(self, call: Callable[[Any], Any], copies: Sequence[Any]) -> None:
        self.call, self.copies, self.next = call, copies, 0

    def __call__(self) -> Any:
        copy = self.copies[self.next % len(self.copies)]
        self.next += 1
        return self.call(copy)


def timed(call: Callable[[], Any], graph: bool, milliseconds: float) -> list[float]:
    """Microseconds at QUANTILES: of replays of a CUDA graph of many calls, or of single launches with a cold cache.

    milliseconds: how long one replay, or all single launches together, shall take. On a CPU: one call.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return [(time.perf_counter() - began) * 1e6] * 3
    if graph:
        found = do_bench_cudagraph(call, rep=max(1, round(milliseconds)), quantiles=list(QUANTILES))
    else:
        found = do_bench(call, warmup=max(1, milliseconds / 4), rep=milliseconds * 5, quantiles=list(QUANTILES))
    return [1e3 * number for number in found]


def measured_rates() -> Rates | None:
    """Of a copy of 1 GiB and of a product of 8192 cubed, medians; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copied = do_bench(partial(torch.empty_like(source).copy_, source), return_mode="median") * 1e-3
    del source
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    multiplied = do_bench(lambda: a @ b.T, return_mode="median") * 1e-3
    return Rates(2 * 2**30 / copied, 2 * 8192**3 / multiplied)


def launches(call: Callable[[], Any]) -> int | None:
    """What one call puts into a CUDA graph: kernels, copies and fills. None where that cannot be counted."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    try:
        call()  # compiled outside
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            call()
        count = ctypes.c_size_t()
        failed = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
            ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
        )
    except (TypeError, AttributeError, OSError, RuntimeError):  # a torch without it, no such library, no capture
        return None
    return None if failed else count.value


def versions() -> dict[str, str | None]:
    """Device and packages that a figure belongs to."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, interpreted"
    others = {package: of(package) for package in ("transformers", "vllm")}
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, **others}
