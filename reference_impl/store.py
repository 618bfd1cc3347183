"""Routed experts on the host, by slot, in shared memory that any process can read.

The owner removes the segment by closing the store; if the owner is killed, its resource tracker does. A reader must not
register with a tracker of its own, or the segment would vanish with the first reader that exits
(https://github.com/python/cpython/issues/82300).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_conformance.engine import CaptureSpec
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.capture import UNWRITTEN, storage_dtype, widen


@dataclass(frozen=True)
class StoreAddress:
    """What a reader needs, picklable. shape: [slots, L, K]. dtype: of the ids stored. lock: path of the lock file."""

    segment: str
    shape: tuple[int, int, int]
    dtype: str
    lock: str


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock against other stores and readers of this user; the kernel frees it if this process dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _attach(segment: str) -> SharedMemory:
    """Open a segment without telling this process's resource tracker, which would remove it at exit."""
    if sys.version_info >= (3, 13):
        return SharedMemory(segment, track=False)
    with patch.object(resource_tracker, "register", lambda *_: None):
        return SharedMemory(segment)


def _remove(segment: SharedMemory) -> None:
    segment.close()
    with contextlib.suppress(FileNotFoundError):
        segment.unlink()


def _slot_index(slots: Sequence[int], size: int) -> list[int]:
    index = [int(slot) for slot in slots]
    for slot in index:
        if not 0 <= slot < size:
            raise InputError(f"slots: got {slot}, want 0 to {size - 1}, the store's slots")
    return index


class HostStore:
    """The owner and only writer of `spec.max_tokens` slots, each [L, K] ids: a `CaptureStore`."""

    def __init__(self, spec: CaptureSpec) -> None:
        self.experts = spec.experts
        shape = (spec.max_tokens, spec.layers, spec.top_k)
        unwritten = torch.full(shape, UNWRITTEN).to(storage_dtype(spec.experts)).numpy()
        # One lock file per user, for all stores: a file per store would stay behind when its owner is killed.
        lock = Path(tempfile.gettempdir()) / f"moe-conformance-{os.getuid()}.lock"
        name = f"moe-{os.getpid()}-{secrets.token_hex(4)}"  # macOS allows 31 characters
        self._segment = SharedMemory(name, create=True, size=max(1, unwritten.nbytes))
        self._removal = weakref.finalize(self, _remove, self._segment)  # also when the interpreter exits
        self.address = StoreAddress(name, shape, unwritten.dtype.name, str(lock))
        with _locked(self.address.lock):
            _rows(self._segment, self.address)[:] = unwritten

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        """Set the ids of some slots, all of them at once for every reader.

        slots: n distinct slots. rows: [n, L, K], any integer dtype, UNWRITTEN for a layer that was not captured.
        Raises InputError, with nothing changed, for a slot or an id out of range, a repeated slot, another shape.
        """
        if not self._removal.alive:
            raise InputError("store: got a write after close, want an open store")
        index = _slot_index(slots, self.address.shape[0])
        if len(set(index)) != len(index):
            raise InputError(f"slots: got {index}, want each slot once, a slot holds one token")
        if tuple(rows.shape) != (len(index), *self.address.shape[1:]) or rows.is_floating_point():
            want = [len(index), *self.address.shape[1:]]
            raise InputError(f"rows: got {rows.dtype} {list(rows.shape)}, want integer {want}")
        bad = (rows < UNWRITTEN) | (rows >= self.experts)
        if bad.any():
            raise InputError(
                f"rows: got expert id {int(rows[bad][0])}, want 0 to {self.experts - 1}, or {UNWRITTEN} for none"
            )
        stored = rows.cpu().to(storage_dtype(self.experts)).numpy()
        with _locked(self.address.lock):
            _rows(self._segment, self.address)[index] = stored

    def close(self) -> None:
        """Remove the segment. Readers that have it open can go on reading; nobody can open it again."""
        self._removal()


class HostReader:
    """Reads slots in any process: a `CaptureReader`. Opening raises InputError once the store is gone."""

    def __init__(self, address: StoreAddress) -> None:
        self.address = address
        try:
            self._segment = _attach(address.segment)
        except FileNotFoundError:
            raise InputError(
                f"address: got segment {address.segment}, which is gone, want that of a store whose owner lives"
            ) from None

    def read(self, slots: Sequence[int]) -> Tensor:
        """The ids of these slots, in this order: [n, L, K] int32, UNWRITTEN where none were written.

        Raises InputError for a slot out of range.
        """
        index = _slot_index(slots, self.address.shape[0])
        with _locked(self.address.lock):
            stored = _rows(self._segment, self.address)[index]  # a copy
        return widen(torch.from_numpy(stored))

    def close(self) -> None:
        """Close this view of the segment; the segment stays."""
        self._segment.close()


def _rows(segment: SharedMemory, address: StoreAddress) -> NDArray[np.integer]:
    """The slots as an array [slots, L, K]. Not to be kept: a segment with a view on it cannot be closed."""
    return np.ndarray(address.shape, dtype=address.dtype, buffer=segment.buf)
