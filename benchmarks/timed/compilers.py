"""Processes that compile launches ahead, each on a core of its own, into the cache from which this process takes them.

Threads would wait for each other: a sixth of a compilation is Python.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import triton

# Module and name of a kernel, and Triton's own record of how one launch specialises it.
Specialized = tuple[str, str, str]


class Compilers:
    def __init__(self, processes: int) -> None:
        target = triton.runtime.driver.active.get_current_target()
        # Spawned: a process with a context on the GPU cannot be forked.
        self.pool = ProcessPoolExecutor(processes, get_context("spawn"), aim, (target,))

    def compile(self, calls: Iterable[Callable[[], object]], seconds: float) -> None:
        """What the calls would launch, as far as time goes. What does not compile says so when it is launched."""
        with contextlib.suppress(BrokenProcessPool):
            futures = [self.pool.submit(compile_one, *one) for one in dict.fromkeys(specialized(calls))]
            for left in wait(futures, seconds).not_done:
                left.cancel()


def specialized(calls: Iterable[Callable[[], object]]) -> list[Specialized]:
    """Of every kernel that is not compiled yet; nothing is launched."""
    found: list[Specialized] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((fn.module, fn.jit_function.__name__, compile["specialization_data"]))
        return True  # as if it were compiled elsewhere

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = keep
        for call in calls:
            call()
    return found


def aim(target: Any) -> None:
    """Compile for this target in a process that never asks for the device."""
    answers = {"target": target, "device": "none", "stream": 0}
    questions = {f"get_current_{what}": lambda *_, answer=answer: answer for what, answer in answers.items()}
    triton.runtime.driver.set_active(SimpleNamespace(**questions))


def compile_one(module: str, kernel: str, specialization: str) -> None:
    getattr(importlib.import_module(module), kernel).preload(specialization)
