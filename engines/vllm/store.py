"""What vLLM keeps of routed experts on the host, by slot, in the three forms that its releases have.

To 0.20 shared memory that the worker writes and the scheduler reads, each with its own class; from 0.22 a buffer in
the scheduler's process, one row a slot of the cache; in the newest a store of blocks under the hashes of their tokens,
here blocks of one token, whose hash changes with every write to a slot.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_conformance.engine import CaptureReader, CaptureSpec, CaptureStore
from moe_conformance.engines.vllm import capture, runtime, sizes
from moe_conformance.errors import Unsupported


def open_store(spec: CaptureSpec) -> CaptureStore:
    runtime.start()
    return _class()(spec)


def open_reader(address: Any) -> CaptureReader:
    runtime.start()
    reader: CaptureReader = address.reader()
    return reader


def _class() -> Any:
    rec = sizes.recorder()
    if hasattr(rec, "RoutedExpertsReader"):
        return SharedMemory
    if hasattr(rec, "RoutedExpertsManager"):
        return Manager
    try:
        import vllm.distributed.aux_output_connector.store  # noqa: F401
    except ImportError as error:
        raise Unsupported("capture_store: this release keeps rows by request, and by no slot") from error
    return Blocks


def features() -> frozenset[str]:
    """Only a store with keys tells what was written. Raises ImportError where this release keeps rows otherwise."""
    try:
        return frozenset({"unwritten"}) if _class() is Blocks else frozenset()
    except Unsupported as refusal:
        raise ImportError(str(refusal)) from refusal


def _config(spec: CaptureSpec) -> Any:
    return sizes.vllm_config_of(capture.model_config(spec.layers, spec.top_k, spec.experts))


class _Captured:
    """The worker's capturer, which rows go through on their way to the host."""

    def __init__(self, spec: CaptureSpec, config: Any) -> None:
        self.layers = spec.layers
        self._stack = contextlib.ExitStack()
        self.real = self._stack.enter_context(sizes.capturer(config, spec.max_tokens)).real

    def capture(self, rows: Tensor) -> None:
        """rows: [n, L, K], of one step."""
        from vllm.forward_context import override_forward_context

        with override_forward_context(capture.context(None, len(rows))):
            for layer in range(self.layers):
                self.real.capture(layer, rows[:, layer])

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class _Shared:
    """Where a reader finds the memory."""

    spec: CaptureSpec
    instance: str

    def reader(self) -> SharedReader:
        config = _config(self.spec)
        config.instance_id = self.instance
        return SharedReader(self.spec.max_tokens, config)


class SharedMemory:
    def __init__(self, spec: CaptureSpec) -> None:
        config = _config(spec)
        self.address = _Shared(spec, config.instance_id)
        self._captured = _Captured(spec, config)

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        self._captured.capture(rows)
        self._captured.real.save_captured_experts(np.asarray(slots, dtype=np.int64))

    def close(self) -> None:
        self._captured.close()


class SharedReader:
    def __init__(self, slots: int, config: Any) -> None:
        self._real = sizes.recorder().RoutedExpertsReader()
        self._real.attach_buffer(slots, config)

    def read(self, slots: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._real.get_routed_experts(np.asarray(slots, dtype=np.int64)))

    def close(self) -> None:
        self._real._host_buffer_view = None
        self._real.cleanup()


class _InProcess:
    """A store that is its own address and reader, and ends with its process."""

    _is_open = True

    @property
    def address(self) -> _InProcess:
        return self

    def __reduce__(self) -> Any:
        raise Unsupported("capture_store: this release keeps rows in the process that hands them on, and in no other")

    def reader(self) -> Any:
        if not self._is_open:
            raise Unsupported("capture_store: what this release keeps is closed by nobody; it ends with the process")
        return SimpleNamespace(read=self.read, close=lambda: None)

    def read(self, slots: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        self._is_open = False


class Manager(_InProcess):
    """The scheduler's buffer, of blocks of one slot."""

    def __init__(self, spec: CaptureSpec) -> None:
        config = sizes.kv_cache_config(blocks=spec.max_tokens, block_size=1)
        self._real = sizes.recorder().RoutedExpertsManager(_config(spec), config)

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        self._real.store_batch(rows.numpy(), np.asarray(slots, dtype=np.int64))

    def read(self, slots: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._real.get(list(slots), len(slots)).astype(np.int64))


class Blocks(_InProcess):
    """Rows are captured, staged by request, and published under keys; they are read by their keys.

    A write is a request whose positions are the slots, one to a block. The store answers for what has no block, too: a
    slot that nobody wrote is asked for by the key that its block would have.
    """

    def __init__(self, spec: CaptureSpec) -> None:
        from vllm.distributed.aux_output_connector import routed_experts, store

        self._module, self._slots = routed_experts, spec.max_tokens
        self._captured = _Captured(spec, _config(spec))
        self._dtype = np.dtype(self._captured.real.output_dtype_name)
        self._shape = self._captured.real.shape_per_token
        row = int(np.prod(self._shape)) * self._dtype.itemsize
        self._store = store.BackgroundBlockObjectStore(
            store.BlockObjectStore(max_bytes=spec.max_tokens * row, object_nbytes=row), max_pending_batches=4
        )
        self._staged = routed_experts.RoutedExpertsBuffer(self._dtype, self._shape, 1, 4, spec.max_tokens, 2)
        self._last_write: dict[int, int] = {}
        self._writes = itertools.count(1)

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        if not slots:
            return
        self._captured.capture(rows)
        captured = self._captured.real.snapshot_routing_data(len(slots)).numpy()
        write = next(self._writes)
        keys = self._keys(write, range(self._slots))
        blocks = [
            block
            for slot, row in zip(slots, captured, strict=True)
            for block in self._staged.capture(f"request-{write}", slot, row[None])
        ]
        self._module.publish_routed_experts(
            self._store,
            batches=[(keys, blocks)],
            block_size=1,
            retain_keys=[key for slot in slots for key in keys[slot : slot + 1]],
            release_keys=self._keys_of(slot for slot in slots if slot in self._last_write),
        )
        self._last_write |= dict.fromkeys(slots, write)

    def _keys_of(self, slots: Iterable[int]) -> list[str]:
        """Of each slot's last write, or of a write that never was."""
        return [key for slot in slots for key in self._keys(self._last_write.get(slot, 0), [slot])]

    def _keys(self, write: int, slots: Iterable[int]) -> list[str]:
        """Of the hashes that the blocks of a write have, of which none is another's."""
        hashes = [f"{write}/{slot}".encode() for slot in slots]
        keys: list[str] = self._module.routed_experts_keys(hashes, "conformance")
        return keys

    def reader(self) -> Any:
        """Whatever is read of a closed store, the store itself refuses."""
        return SimpleNamespace(read=self.read, close=lambda: None)

    def read(self, slots: Sequence[int]) -> Tensor:
        found = self._module.materialize_routed_experts(
            self._store, self._keys_of(slots), shape_per_token=self._shape, dtype=self._dtype
        )
        return torch.from_numpy(found.astype(np.int64))

    def close(self) -> None:
        super().close()
        self._store.close()
        self._captured.close()
