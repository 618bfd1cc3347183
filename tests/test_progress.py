"""What a run says while it lasts: a line in a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_conformance.running.progress import Progress

COMMAND = [sys.executable, "-m", "moe_conformance.cli", "run", "--engine", "reference", "--in-process"]
CASES = ["--case", "layer-tiny-plain", "--case", "layer-tiny-latent", "-k", "padding_never"]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST") and name != "CI"}


def in_a_terminal(folder: Path, *arguments: str) -> str:
    """All that the command writes where its output is one."""
    ours, its = pty.openpty()
    with subprocess.Popen([*COMMAND, *CASES, *arguments], cwd=folder, env=CLEAN, stdout=its, stderr=its) as running:
        os.close(its)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # Linux's end of file
            pass
    os.close(ours)
    assert running.returncode == 0, said
    return said.decode()


def test_a_terminal_is_told_engine_stage_and_how_far_and_a_pipe_nothing(tmp_path: Path) -> None:
    said = in_a_terminal(tmp_path)
    assert re.search(r"\r1/2  50%  reference: layer +", said)
    before, _, _ = said.partition("= conformance =")
    assert before.endswith("=") and re.search(r"\r +\r\r?\n?=|\r\x1b|\r +\r", before)  # wiped
    piped = subprocess.run([*COMMAND, *CASES], cwd=tmp_path, env=CLEAN, text=True, capture_output=True)
    assert piped.returncode == 0 and "%" not in piped.stdout.partition("= conformance =")[0]
    assert re.match(r"\n*=+ conformance =", piped.stdout), piped.stdout


@pytest.mark.nightly
def test_with_v_the_words_are_pytests(tmp_path: Path) -> None:
    assert "  50%  " not in in_a_terminal(tmp_path, "-v", "-v")


def test_a_line_has_failures_and_the_time_left() -> None:
    progress = Progress()
    progress.session = SimpleNamespace(targets=[SimpleNamespace(name="mine"), SimpleNamespace(name="mine-too")])
    progress.total, progress.done, progress.failed, progress.started = 400, 100, 3, 1000.0
    progress.running = dict.fromkeys(["a.py::test_x[mine-too-layer-tiny-plain]", "a.py::test_y[mine-not-offered]"])
    assert progress.line(1040.0) == "100/400  25%  mine-too: layer, mine  3 failed  2:00 left"
