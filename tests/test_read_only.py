"""Runs by somebody who may not write where others may: every place in turn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASE = "closure-gemma4-per-expert-scale-functional-call"
# Root may write anywhere, but for this.
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def _run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*UNPRIVILEGED, sys.executable, "-m", "moe_conformance", "run", "--engine", "reference", "--case", CASE]
    return subprocess.run(
        [*command, "-n", "0", *options], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that takes nothing."""
    if UNPRIVILEGED and shutil.which(UNPRIVILEGED[0]) is None:
        pytest.skip("root, and no setpriv (util-linux) to lay its privileges down with")
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    tried = subprocess.run([*UNPRIVILEGED, "touch", str(folder / "file")], capture_output=True)
    assert tried.returncode != 0
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["where it is started", "HOME", "TMPDIR"])
def test_a_run_needs_no_place_to_write(closed: Path, tmp_path: Path, place: str) -> None:
    done = _run(closed) if place == "where it is started" else _run(tmp_path, **{place: str(closed)})
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert re.search(r"\n[a-z-]+ +0/2\n", done.stdout)
    assert not any(closed.iterdir())


def test_results_that_cannot_be_written_are_refused_before_anything_runs(closed: Path) -> None:
    done = _run(closed, "--out", "results")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "--out: cannot write to results: [Errno 13] Permission denied: 'results'" in done.stdout + done.stderr
