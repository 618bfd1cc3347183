"""`ci/aot.py` compiles for GPUs that are not here, in a process of its own: it replaces what registers operators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[1] / "ci" / "aot.py"
TABLE = COMMAND.with_name("aot.md")
# Both products of one model on a target of each vendor; the first row's registers are kept as fewer than they are.
ROWS = ["--only", "Gemma 4 26B-A4B T 64", "--target", "sm_90", "--target", "gfx942"]
KEPT = "| gate_up | Gemma 4 26B-A4B T 64 | sm_90 | 16 x 64 x 128, 4 warps, 3 stages | 80 |"
WORSENED = KEPT.replace("| 80 |", "| 40 |")
FAILURE = "gate_up Gemma 4 26B-A4B T 64 sm_90: registers: got 80, want at most 48, for 40 are kept"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    table = tmp_path_factory.mktemp("aot") / "aot.md"
    table.write_text(TABLE.read_text().replace(KEPT, WORSENED))
    command = [sys.executable, COMMAND, *ROWS, "--table", table]
    return subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, timeout=300)


def test_four_kernels_compile_for_two_targets_that_are_not_here(ran: subprocess.CompletedProcess[str]) -> None:
    assert "4 compiled" in ran.stdout, ran.stdout + ran.stderr


def test_a_figure_worse_than_the_kept_one_fails_the_command(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 1
    assert FAILURE in ran.stderr


def test_whatever_else_was_compiled_meets_its_guards(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.stdout.rstrip().endswith("1 failures"), ran.stderr
