"""Where the command line writes: terminals of ASCII alone, full disks, and somebody who presses Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_folders import T, config_of, floats, write

COMMAND = [sys.executable, "-m", "moe_conformance", "checkpoint"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a name in an MoE block that ASCII does not have."""
    tensors = floats("qwen3_moe") | {"model.layers.5.mlp.experts.3.up_proj.wéight": T("BF16", (2,))}
    return write(tmp_path / "model", config_of("qwen3_moe"), tensors)


def test_names_are_escaped_where_the_terminal_has_ascii_alone(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, str(folder)], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert rb"experts.3.up_proj.w\xe9ight" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, str(folder)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "moe-conformance: No space left on device; what was said is not whole\n"


def test_an_interrupted_command_ends_without_a_word(folder: Path) -> None:
    code = (
        "import os, signal, moe_conformance.checkpoints.command as command, moe_conformance.cli as cli\n"
        "command.judged = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"cli.main(['checkpoint', {str(folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, b"", b"")
