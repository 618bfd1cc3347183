"""What an engine leaves behind: processes in sessions of their own, and shared memory.

Nothing is touched unless it is proven to be the engine's. A process is the engine's if its environment has the mark
(the folder of its child), or if it descends from such a process. A segment is the engine's if it appeared while the
engine ran, was seen open or mapped in a process of the engine, and is so in no other. All of this is read from /proc;
without /proc, nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The variable whose value is the folder of the child that a process belongs to.
MARK = "MOE_CONFORMANCE_CHILD"
SHARED = Path("/dev/shm")
# File in a child's folder, for the next run: the segments that were seen to be its own.
RECORD = "segments"
# Seconds for helpers that clean up after their clients; they notice at once when the last client is gone.
GRACE = 1.0
_HELPERS = (b"multiprocessing.resource_tracker", b"torch_shm_manager")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Process(NamedTuple):
    """pages: resident memory, in pages."""

    pid: int
    parent: int
    session: int
    pages: int


def family(root: int) -> list[Process]:
    """The living processes of root's session, and their descendants in any."""
    found, rest = [], list(_living())
    pids: set[int] = {root}
    while near := [process for process in rest if process.session == root or process.parent in pids]:
        found += near
        pids |= {process.pid for process in near}
        rest = [process for process in rest if process.pid not in pids]
    return found


def _living() -> Iterator[Process]:
    for pid in _pids():
        with contextlib.suppress(OSError):
            state, *values = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if state != "Z":
                yield Process(pid, int(values[0]), int(values[2]), int(values[20]))


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _marked(folder: Path) -> set[int]:
    found, mark = set(), os.fsencode(f"{MARK}={folder}")
    for pid in _pids():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    return found - {os.getpid()}


class Segments:
    """The shared-memory segments that a child made, as far as they were seen while it held them.

    Create this before the child.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = _names()

    def look(self, root: int) -> None:
        """Note which new segments root, or what it started, holds. Costs one directory listing while there are none."""
        names = _names()
        if new := names - self._known:
            pids = _marked(self._folder) | {process.pid for process in family(root)}
            if own := [f"{_inode(name)} {name}\n" for name in sorted(new & _held(pids)) if _inode(name)]:
                record = self._folder / RECORD
                begin = "" if record.exists() else f"{_boot()}\n"
                with contextlib.suppress(OSError), record.open("a", encoding="utf-8") as stream:
                    stream.write(begin + "".join(own))
        self._known = names


def _names() -> set[str]:
    try:
        return set(os.listdir(SHARED))
    except OSError:
        return set()


def _boot() -> str:
    """Inode numbers mean nothing after the machine restarts."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def _inode(name: str) -> int:
    """The inode of a segment that this user owns; 0 if it is not."""
    try:
        found = (SHARED / name).lstat()
    except OSError:
        return 0
    return found.st_ino if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() else 0


def _held(pids: set[int]) -> set[str]:
    """Names of segments that these have open or mapped."""
    found, shared = set(), f"{SHARED}/"
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()).splitlines()
            found |= {shared + line.partition(shared)[2] for line in lines if shared in line}
        with contextlib.suppress(OSError):
            for link in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(link.path))
    return {path.removeprefix(shared) for path in found if path.startswith(shared)}


def clear(folder: Path, root: int | None = None, patience: float = GRACE) -> None:
    """End what has the folder's mark and, where root is given, what descends from it, but not this process; remove the
    segments that they left, and the folder.

    root: a child, waited for just now or not at all, so that its number is no other's. patience: seconds for helpers to
    do their work; with 0 they are left alone, for their client is this process.
    """
    _end(folder, root, patience)
    with contextlib.suppress(OSError, ValueError):
        boot, *lines = (folder / RECORD).read_text(encoding="utf-8").splitlines()
        pairs = [line.partition(" ") for line in lines if boot == _boot()]
        own = {name for inode, _, name in pairs if "/" not in name and int(inode) == _inode(name) != 0}
        for name in own - _held(set(_pids()) - {root} if own else set()):
            (SHARED / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _end(folder: Path, root: int | None, patience: float) -> None:
    """Repeatedly, because a process that is being killed may just start another. Helpers come last."""
    end, own = time.monotonic() + (patience or GRACE), os.getpid()
    if root is not None and not _pids():  # as on macOS
        os.killpg(root, signal.SIGKILL)
    descend = {process.pid for process in family(root)} if root is not None else set()
    while left := (_marked(folder) | descend) - {own}:
        workers, is_over = {pid for pid in left if not _is_helper(pid)}, time.monotonic() > end
        for pid in left if is_over and patience else workers:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if is_over or not (workers or patience):
            return
        descend = {process.pid for process in _living() if process.pid in descend or process.parent in descend}
        time.sleep(0.002)


def _is_helper(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in _HELPERS)
