"""What an engine leaves, processes in sessions of their own and shared memory, goes with it; what others made stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from moe_conformance.running.child import Child, Ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Of what each leaves, processes have the tag among their words.
LEAVES = """
import json, os, subprocess, sys, threading, time
from multiprocessing import get_context, resource_tracker, shared_memory
tag, write = sys.argv[1], int(sys.argv[3])
before = set(os.listdir("/dev/shm"))
sleeps = [sys.executable, "-c", "import time; time.sleep(60)", tag]

def in_a_session_of_its_own(): subprocess.Popen(sleeps, start_new_session=True)
def without_the_environment(): subprocess.Popen(sleeps, start_new_session=True, env={})
def in_its_group_without_the_environment(): subprocess.Popen(sleeps, env={})
def a_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execv(sleeps[0], sleeps)
        os._exit(0)
    os.wait()
def tracked(): return shared_memory.SharedMemory(create=True, size=64)
def untracked():
    made = shared_memory.SharedMemory(create=True, size=64)
    resource_tracker.unregister(made._name, "shared_memory")
    return made
def by_a_child():
    name = f"by-a-child-{tag}"
    code = f"import time; held = open('/dev/shm/{name}', 'wb'); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", code, tag], start_new_session=True)
    while not os.path.exists(f"/dev/shm/{name}"): time.sleep(0.01)
def a_semaphore(): return get_context("spawn").Semaphore()
def of_another_program():
    while not os.path.exists(f"/dev/shm/foreign-{tag}"): time.sleep(0.01)
    held = shared_memory.SharedMemory(f"foreign-{tag}")
    resource_tracker.unregister(held._name, "shared_memory")
    return held

kept = [act() for act in (
    of_another_program, in_a_session_of_its_own, a_daemon, tracked, untracked, by_a_child, a_semaphore,
)]
def made():
    names = {name for name in os.listdir("/dev/shm") if name not in before and name != f"foreign-{tag}"}
    os.write(write, (json.dumps(sorted(names)) + "\\n").encode())
def tracked_at_the_end(): return shared_memory.SharedMemory(f"at-the-end-{tag}", create=True, size=64)
"""
# How it ends. With neither the mark nor a parent, a process is nobody's; nor is a segment that was never seen held.
ENDS = {
    "is-killed": "without_the_environment(); in_its_group_without_the_environment(); made(); time.sleep(60)",
    "dies": "in_its_group_without_the_environment(); made(); time.sleep(0.4); tracked_at_the_end(); os.abort()",
    "exits": "made(); time.sleep(0.4); tracked_at_the_end(); os._exit(0)",
}
PARENT = """
import json, os, sys
from moe_conformance.running.child import Child
child = Child(json.loads(sys.argv[1]), {})
print(child.hear(20), flush=True)
os.kill(child._process.pid, 9)
os.kill(os.getpid(), 9)
"""
SWEEP = "from moe_conformance.running.child import Folder; Folder().remove()"


def processes(tag: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if tag in words and int(file.parent.name) != os.getpid():
            found.append(" ".join(words))
    return found


@contextmanager
def another_program(tag: str) -> Iterator[None]:
    """A process and two segments, one of which the engine opens, that came after the engine, and stay."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"other-{tag}"])
    opened, closed = others(tag)
    held = shared_memory.SharedMemory(opened, create=True, size=64)
    Path("/dev/shm", closed).touch()
    try:
        yield
        assert (process.poll(), there(others(tag))) == (None, others(tag))
    finally:
        process.kill()
        process.wait()
        held.close()
        with suppress(FileNotFoundError):
            held.unlink()
        Path("/dev/shm", closed).unlink(missing_ok=True)


def others(tag: str) -> list[str]:
    return [f"foreign-{tag}", f"unrelated-{tag}"]


def there(names: Iterable[str]) -> list[str]:
    return [name for name in names if Path("/dev/shm", name).exists()]


@pytest.mark.parametrize("end", ENDS)
def test_nothing_outlives_an_engine_and_nothing_else_goes_with_it(end: str) -> None:
    tag = f"leaves-{os.getpid()}-{end}"
    child = Child([sys.executable, "-c", LEAVES + ENDS[end], tag], {})
    with another_program(tag):
        names = {*json.loads(child.hear(20)), f"at-the-end-{tag}"} - {*others(tag)}
        assert len(processes(tag)) >= 3 and len(there(names)) >= 4
        if end != "is-killed":
            with pytest.raises(Ended):
                child.hear(20)
        child.kill()
        assert (processes(tag), there(names)) == ([], [])


def test_what_all_were_killed_around_the_next_run_sweeps(tmp_path: Path) -> None:
    tag, environment = f"leaves-{os.getpid()}-next", {**os.environ, "TMPDIR": str(tmp_path)}
    command = json.dumps([sys.executable, "-c", LEAVES + "made(); time.sleep(60)", tag])
    parent = [sys.executable, "-P", "-c", PARENT, command]
    with subprocess.Popen(parent, env=environment, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        with another_program(tag):
            names = {*json.loads(killed.stdout.readline())} - {*others(tag)}
            killed.wait()
            assert processes(tag) and there(names)
            subprocess.run([sys.executable, "-P", "-c", SWEEP], env=environment, check=True)
            assert (processes(tag), there(names), list(tmp_path.iterdir())) == ([], [], [])
