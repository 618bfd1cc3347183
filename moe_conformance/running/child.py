"""A child process and what it says: lines on two private descriptors, each with a deadline and a maximum length.

They are private so that nothing an engine or its libraries print or read can get among them: the child's standard
output goes to its standard error, and its standard input is empty.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from moe_conformance.running.leftovers import MARK, Segments, clear, family

# Bytes of a line; the largest answer of a correct engine has a few thousand.
LARGEST = 16 << 20
# Seconds between looks at a silent child: whether it lives, and how large it is.
LOOK = 0.2
PREFIX, LOCK = "moe-conformance-", "lock"
# The variable that says who a child's parent is.
PARENT = "MOE_CONFORMANCE_PARENT"
# Seconds for a child that hangs to write where it was.
LAST_WORDS = 2.0


class Silent(Exception):
    """No whole line within the time."""


class Ended(Exception):
    """The child has ended, or closed its end."""


class TooLong(Exception):
    """A line without an end."""


class Hungry(Exception):
    """The child and what it started use more memory than allowed. The message says how much."""


class Unstarted(Exception):
    """No process can be started: no descriptor, memory or disk is left, or a variable is invalid."""


class Child:
    """Runs at once. Raises Unstarted.

    command: without the two descriptors, which come last: what to read from, and what to write to. memory: resident
    bytes that it and what it started may have together, looked at while it is listened to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], memory: float = math.inf) -> None:
        self._memory = memory
        self._heard = b""
        with ExitStack() as undo:
            try:
                theirs_to_read, self._questions = _pipe(undo)
                self._answers, theirs_to_write = _pipe(undo)
                self._errors = undo.enter_context(tempfile.TemporaryFile("w+b"))
                self._folder = Folder()
                undo.callback(self._folder.remove)
                self._segments = Segments(self._folder.path)
                self._process = subprocess.Popen(
                    [*command, str(theirs_to_read), str(theirs_to_write)],
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,
                    stderr=self._errors,
                    env={**_caches(), **os.environ, **environment, **self._own()},
                    pass_fds=(theirs_to_read, theirs_to_write),
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                raise Unstarted(f"cannot start a process: {error}") from error
            undo.pop_all()
        os.close(theirs_to_read)
        os.close(theirs_to_write)
        os.set_blocking(self._answers, False)

    def _own(self) -> dict[str, str]:
        # setproctitle, which vLLM calls, would write its title over the mark.
        marks = {MARK: str(self._folder.path), PARENT: str(os.getpid()), "SPT_NOENV": "1"}
        return {"TMPDIR": str(self._folder.path), **marks}

    def say(self, line: str) -> None:
        """Raises Ended if nobody listens."""
        try:
            os.write(self._questions, line.encode())
        except OSError as error:
            raise Ended from error

    def hear(self, seconds: float) -> str:
        """The next line. Raises Silent, Ended or TooLong."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                left = deadline - time.monotonic()
                if len(self._heard) > LARGEST:
                    raise TooLong
                if not selector.select(max(0.0, min(left, LOOK))):
                    self._segments.look(self._process.pid)
                    self._weigh()
                # The child's end is asked of the child itself, because what it started may hold the pipe open; and
                # before reading, because its last line may be complete.
                has_ended = self._process.poll() is not None
                if (has_more := self._read()) and b"\n" in self._heard:
                    break
                if not has_more and (has_ended or self._is_closed):
                    raise Ended
                # What had arrived in time is read to its end; a child that writes forever is not.
                if left <= 0 and (not has_more or left < -LOOK):
                    raise Silent
        self._segments.look(self._process.pid)
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode(errors="replace")

    _next_weighing = 0.0

    def _weigh(self) -> None:
        """Raise Hungry where it and what it started are too large, as far as the system tells.

        Takes a hundredth of the time at most, for there may be many processes to look through.
        """
        began = time.monotonic()
        if self._memory < math.inf and began >= self._next_weighing:
            size = sum(process.pages for process in family(self._process.pid)) * os.sysconf("SC_PAGE_SIZE")
            if size > self._memory:
                raise Hungry(f"{size / 2**30:.1f} GiB, more than {self._memory / 2**30:.1f} GiB")
            now = time.monotonic()
            self._next_weighing = now + 100 * (now - began)

    def unasked(self) -> bytes:
        """What it has written beyond the lines that were read."""
        self._read()
        return self._heard

    _is_closed = False

    def _read(self) -> bool:
        """Whether anything was read."""
        try:
            read = os.read(self._answers, 1 << 16)
        except BlockingIOError:
            return False
        self._is_closed = not read
        self._heard += read
        return bool(read)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended; waits at most this many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def where_it_is(self) -> None:
        """Let a child that hangs write the stacks of its threads, which ends it: host.py has faulthandler do it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS)

    def ending(self) -> str:
        """How it ended: "exit code 3", "signal SIGSEGV"."""
        code = self._process.wait()
        try:
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            return f"exit code {code}"

    def last_words(self) -> str:
        """The end of what it printed, to be put behind a message; empty where it printed nothing."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 8000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        tail = [line for line in lines if not line.startswith("Extension modules:")][-30:]
        return "; its last words:\n" + "\n".join(f"  {line}" for line in tail) if tail else ""

    def kill(self) -> None:
        """End it and all it started, and remove what they left."""
        self._segments.look(self._process.pid)
        clear(self._folder.path, self._process.pid)
        self._process.wait()
        os.close(self._questions)
        os.close(self._answers)
        self._errors.close()
        self._folder.remove()


def _pipe(undo: ExitStack) -> tuple[int, int]:
    read, write = os.pipe()
    undo.callback(os.close, read)
    undo.callback(os.close, write)
    return read, write


class Folder:
    """A child's temporary files. Locked while this process lives: what a killed run leaves, a later run sweeps."""

    def __init__(self) -> None:
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        made = self.path / "new"  # must not be found before it is locked
        self._lock = os.open(made, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.rename(self.path / LOCK)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # a second time, for what was just being written
        os.close(self._lock)


def _caches() -> dict[str, str]:
    """What compilers keep for the next process does not go with this one: torch keeps it among temporary files.

    By number, for a user in a container may have no name.
    """
    return {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"}


@cache
def _sweep() -> None:
    """Remove folders whose owner has ended, and end what is left of their children; once a process."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(lock.parent)
            finally:
                os.close(descriptor)


def follow_parent() -> None:
    """In a child: when its parent ends, however that happens, end with all it started, and leave nothing.

    The parent is identified by the process id that it passed, because it may have ended before this is called.
    """
    parent, folder = int(os.environ[PARENT]), Path(os.environ[MARK])

    def clean() -> None:
        if os.getppid() != parent:
            clear(folder, os.getpid(), patience=0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        clean()
        os.kill(os.getpid(), signal.SIGKILL)

    atexit.register(clean)  # if the parent ended before that
    threading.Thread(target=watch, daemon=True).start()


def python(module: str, *arguments: str) -> list[str]:
    """The command of a module of ours.

    -P: the working directory must not come first on the path; discovery.extend_path appends it. -u: what it printed
    before it died must not die in a buffer.
    """
    return [sys.executable, "-P", "-u", "-m", module, *arguments]
