"""A worker, an engine or the whole run killed at any moment: what was judged is in its cell, what was lost is said, and
nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

CASES = tuple(
    f"layer-tiny-{kind}" for kind in ("plain", "shared", "latent", "shared-latent", "fp16-plain", "bf16-plain")
)
TOGETHER = len(CASES)  # results
MARK = "MOE_CONFORMANCE_TEST_OF_KILLING"
SECONDS = 9.0  # that the run takes about, alone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def processes(mark: str) -> dict[int, str]:
    """Command lines of those alive that a run with this mark in its environment has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            if command and f"{MARK}={mark}".encode() in environment.split(b"\0"):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def victims(mark: str, what: str) -> list[int]:
    words = {"engine": "moe_conformance.running.host", "worker": "exec(eval(sys.stdin.readline()))", "run": "cli run"}
    return sorted(pid for pid, command in processes(mark).items() if words[what] in command)


def wait_until(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(int(os.environ.get("MOE_KILLS", "9"))))
def test_a_kill_at_any_moment_loses_no_result_unsaid(tmp_path: Path, seed: int) -> None:
    choose, mark = random.Random(seed), f"{os.getpid()}-{seed}"
    what = ("engine", "worker", "run")[seed % 3]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    shared = set(Path("/dev/shm").iterdir())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = ["run", "--engine", "reference", "-n", "2", "--out", str(tmp_path / "out")]
    command += [item for case in CASES for item in ("--case", case)]
    with subprocess.Popen(
        [sys.executable, "-m", "moe_conformance.cli", *command],
        env={**clean, MARK: mark, "TMPDIR": str(temporary)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as ran:
        wait_until(lambda: victims(mark, what), 60)
        time.sleep(choose.random() * SECONDS / (3 if what == "engine" else 1))
        if there := victims(mark, what):
            os.kill(choose.choice(there), signal.SIGKILL)
        code = ran.wait(120)
    assert wait_until(lambda: not processes(mark), 10), processes(mark)
    # What was killed between making a folder and telling anybody of it is for the next run to sweep.
    sweep = "from moe_conformance.running.child import Folder; Folder().remove()"
    subprocess.run([sys.executable, "-c", sweep], env={**clean, "TMPDIR": str(temporary)}, check=True)
    assert list(temporary.glob("moe-conformance-*")) == []
    assert set(Path("/dev/shm").iterdir()) <= shared
    told = tmp_path / "out" / "verdicts.jsonl"
    if what == "run" and not told.exists():
        return  # it was killed before it began to tell
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    results = [line for line in lines if line["kind"] == "result"]
    verdicts = Counter(line["verdict"] for line in results)
    was_killed = what == "run" and bool(there)
    if was_killed:
        assert code == -signal.SIGKILL
    if not was_killed or lines[-1]["kind"] == "footer":  # which it may have written just before
        cells = {(line["case"], line["check"]) for line in results}
        assert len(cells) == TOGETHER and lines[-1] == {**lines[-1], "kind": "footer", "results": len(results)}
    if not was_killed:
        assert (code == 0) == (verdicts == {"pass": TOGETHER}), (code, verdicts)
