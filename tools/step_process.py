"""A command in a process group of its own, with a time limit and a bounded log: a step of tools/gpu_job.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Every process of a step has this in its environment, so that those that left the group can be found.
MARK = "MOE_CONFORMANCE_STEP"
# Of a step's output: so much as it comes, and so much of its end. The whole file is cut to half where it is longer.
HEAD, TAIL, WHOLE = 256 * 1024, 64 * 1024, 12 * 2**20
LAST_LINES = 40
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Ended:
    """code: None where it was killed at its limit. tail: the last lines of its output."""

    code: int | None
    seconds: float
    tail: str


class Log:
    """A step's output at the end of a file that all steps share: its head as it comes, its end once it is known."""

    def __init__(self, path: Path, title: str) -> None:
        if path.exists() and path.stat().st_size > WHOLE:
            path.write_bytes(path.read_bytes()[-WHOLE // 2 :])
        self.file = path.open("ab", buffering=0)
        self.file.write(f"==== {title}\n".encode())
        self.written, self.end, self.left_out = 0, bytearray(), 0

    def add(self, data: bytes) -> None:
        now = data[: max(0, HEAD - self.written)]
        self.file.write(now)
        self.written += len(now)
        self.end += data
        excess = max(0, len(self.end) - TAIL)
        self.left_out += len(data) - len(now)
        del self.end[:excess]

    def close(self) -> str:
        """Its last lines."""
        missing = min(self.left_out, len(self.end))
        if self.left_out > missing:
            self.file.write(f"\n[{self.left_out - missing} bytes left out]\n".encode())
        self.file.write(self.end[len(self.end) - missing :] + b"\n")
        self.file.close()
        return "\n".join(self.end.decode(errors="replace").splitlines()[-LAST_LINES:])


def run(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, log: Log, mark: str, folder: Path
) -> Ended:
    """Run it to its end, or to the limit. Whatever raises in between, as on a signal, ends the group first."""
    libc, began = ctypes.CDLL(None), time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, MARK: mark},
        cwd=folder,
        process_group=0,
        preexec_fn=lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL) if hasattr(libc, "prctl") else None,
    )
    assert process.stdout is not None
    pipe, limit = process.stdout.fileno(), began + seconds
    os.set_blocking(pipe, False)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while process.poll() is None and time.monotonic() < limit:
                # Now and then the process itself is asked: others may hold the pipe beyond its end.
                if selector.select(min(0.2, max(0.0, limit - time.monotonic()))) and not copy(pipe, log):
                    time.sleep(0.02)
        code = process.poll()
    finally:
        end(process, mark)
        while copy(pipe, log):
            pass
        process.stdout.close()
        tail = log.close()
    return Ended(code, round(time.monotonic() - began, 2), tail)


def copy(pipe: int, log: Log) -> bool:
    """Whether there was something to copy."""
    try:
        data = os.read(pipe, 65536)
    except BlockingIOError:
        return False
    log.add(data)
    return bool(data)


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """The whole group, and who has left it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    end_marked(mark)
    process.wait()


def end_marked(mark: str) -> int:
    """Kill every process with this mark in its environment; returns how many there were."""
    found = list(marked(mark))
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
