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

COMMAND = [sys.executable, "-m", "moe_conformance.cli", "run", "--engine", "reference"]
CASES = ["--case", "layer-tiny-padded-hidden", "--case", "layer-tiny-latent-padded-hidden", "-k", "padding_never"]
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
    said = in_a_terminal(tmp_path, "--in-process")
    assert re.search(r"\r1/2  50%  reference: layer +", said)
    before, _, _ = said.partition("= conformance =")
    assert before.endswith("=") and re.search(r"\r +\r\r?\n?=|\r\x1b|\r +\r", before)  # wiped
    piped = subprocess.run([*COMMAND, *CASES, "--in-process"], cwd=tmp_path, env=CLEAN, text=True, capture_output=True)
    assert piped.returncode == 0 and "%" not in piped.stdout.partition("= conformance =")[0]
    assert re.match(r"\n*=+ conformance =", piped.stdout), piped.stdout


def test_what_could_not_be_collected_is_said_although_failures_are_told_once(tmp_path: Path) -> None:
    hook = "def pytest_pycollect_makemodule(module_path, parent): raise OSError('no disk')"
    (tmp_path / "other_plugin.py").write_text(hook)
    environment = {**CLEAN, "PYTHONPATH": str(tmp_path)}
    command = [*COMMAND, *CASES, "-n", "0", "-p", "other_plugin"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode != 0 and "not collected: " in done.stdout and "OSError: no disk" in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("workers", ["0", "2"])
def test_engines_in_processes_of_their_own_are_told_of_too(workers: str, tmp_path: Path) -> None:
    assert re.search(r"\r1/2  50%  reference: layer +", in_a_terminal(tmp_path, "-n", workers))


@pytest.mark.nightly
def test_with_v_the_words_are_pytests(tmp_path: Path) -> None:
    assert "  50%  " not in in_a_terminal(tmp_path, "--in-process", "-v", "-v")


def test_a_line_has_failures_and_the_time_left() -> None:
    progress = Progress()
    progress.session = SimpleNamespace(targets=[SimpleNamespace(name="mine"), SimpleNamespace(name="mine-too")])
    progress.total, progress.done, progress.failed, progress.started = 400, 100, 3, 1000.0
    progress.running = dict.fromkeys(
        ["a.py::test_x[mine-too-layer-tiny-padded-hidden]", "a.py::test_y[mine-not-offered]"]
    )
    assert progress.line(1040.0) == "100/400  25%  mine-too: layer, mine  3 failed  2:00 left"
