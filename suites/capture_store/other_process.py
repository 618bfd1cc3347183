"""Parts that a store's check plays in an unrelated process: `python -m` this module, told what to do by a file."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSpec, Engine
from moe_conformance.errors import Nonconformance, Unsupported

# An engine may take long to import; nothing here computes.
START_SECONDS = 120.0


def read_slots(engine: Engine, address: object, slots: Sequence[int]) -> Tensor:
    """What a reader gives in this process."""
    with contextlib.closing(engine.capture_reader(address)) as reader:
        return reader.read(slots)


def own_store(engine: Engine, spec: CaptureSpec, slots: Sequence[int], rows: Tensor, reply: Path) -> None:
    """Make a store, tell its address, and hold it until killed."""
    store = engine.capture_store(spec)
    store.write(slots, rows)
    _write(reply, store.address)
    time.sleep(2 * START_SECONDS)
    store.close()


def rewrite_store(engine: Engine, spec: CaptureSpec, ids: Sequence[int], reply: Path) -> None:
    """Make a store, tell its address, and fill it with one id after the other until killed."""
    slots, shape = range(spec.max_tokens), (spec.max_tokens, spec.layers, spec.top_k)
    filled = [torch.full(shape, expert_id, dtype=torch.int32) for expert_id in ids]
    store = engine.capture_store(spec)
    store.write(slots, filled[0])
    _write(reply, store.address)
    end = time.monotonic() + 2 * START_SECONDS
    for rows in itertools.cycle(filled):
        store.write(slots, rows)
        if time.monotonic() > end:
            break
    store.close()


class OtherProcess:
    """One of the functions above, under way in a process that shares nothing with this one but the engine's class.

    engine: as checks get it; its class is found again by `engine.path`. The function gets the engine and `arguments`,
    and with `pass_reply` the path to answer to, if it does not return.
    """

    def __init__(self, part: Callable[..., Any], engine: Any, *arguments: Any, pass_reply: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._reply, request = Path(self._folder.name, "reply"), Path(self._folder.name, "request")
        if pass_reply:
            arguments = (*arguments, self._reply)
        _write(request, (part.__name__, engine.path, arguments, self._reply))
        self._said = Path(self._folder.name, "stderr")
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(request)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stderr=said,
            )

    def wait(self) -> Any:
        """The function's result, or what it told. Raises Unsupported if it was refused, Nonconformance if it failed."""
        give_up = time.monotonic() + START_SECONDS
        while not self._reply.exists():
            if self._process.poll() is not None and not self._reply.exists():
                status, said = self._process.returncode, self._said.read_text(errors="replace")[-1000:]
                raise Nonconformance(f"other process: got exit status {status}, want an answer; it said: {said}")
            if time.monotonic() > give_up:
                raise Nonconformance(f"other process: got no answer in {START_SECONDS:g} s, want one")
            time.sleep(0.01)
        told = pickle.loads(self._reply.read_bytes())
        if isinstance(told, _Failure) and told.is_refusal:
            raise Unsupported(told.text)
        if isinstance(told, _Failure):
            raise Nonconformance(f"other process: got {told.text}, want an answer")
        return told

    def stop(self) -> None:
        """Halt it where it stands, be it half-way through a write."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, with no chance to clean up."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.is_refusal = isinstance(error, Unsupported)
        self.text = str(error) if self.is_refusal else f"{type(error).__name__}: {error}"


def _write(path: Path, what: Any) -> None:
    """A file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(what))
    part.replace(path)


def _main(request: str) -> None:
    part, engine, arguments, reply = pickle.loads(Path(request).read_bytes())
    module, _, name = engine.partition(":")
    try:
        told = globals()[part](getattr(importlib.import_module(module), name)(), *arguments)
    except Exception as error:
        told = _Failure(error)
    _write(reply, told)


if __name__ == "__main__":
    # Under its own name, so that what is pickled is found where it is unpickled.
    importlib.import_module("moe_conformance.suites.capture_store.other_process")._main(sys.argv[1])
