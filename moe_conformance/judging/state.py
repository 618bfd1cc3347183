"""Process state that a call may change besides answering; it is restored before the next case."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_warnings(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _set_autocast(enabled: tuple[bool, bool]) -> None:
    for device, is_enabled in zip(("cpu", "cuda"), enabled, strict=True):
        torch.set_autocast_enabled(device, is_enabled)


# How to read each state and how to set it. Threads, modes and patched modules are left to the engine.
_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (os.getcwd, os.chdir),
    (_umask, os.umask),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    (lambda: [*warnings.filters], _set_warnings),
    (np.geterr, lambda errors: np.seterr(**errors)),
    (torch.get_default_device, _set_device),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_num_threads, torch.set_num_threads),
    (_autocast, _set_autocast),
)


@contextmanager
def kept() -> Iterator[None]:
    before = [ask() for ask, _ in _STATE]
    try:
        yield
    finally:
        for (ask, put), value in zip(_STATE, before, strict=True):
            if not _is(ask, value):
                put(value)


def _is(ask: Callable[[], Any], value: Any) -> bool:
    try:
        return bool(ask() == value)
    except OSError:  # a folder that is gone
        return False
