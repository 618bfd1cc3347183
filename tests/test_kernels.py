"""What stands under the tests of kernel_twins: the check of addresses, and a process of their own that interprets."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_conformance.running.devices import gpu_count

TWINS = Path(__file__).with_name("kernel_twins")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_the_bounds_check_sees_one_element_too_many(tmp_path: Path) -> None:
    """A copy kernel without a mask reads, then writes, one element behind a tensor."""
    program = tmp_path / "copy_too_far.py"  # the interpreter reads a kernel's source from its file
    program.write_text(COPY_TOO_FAR)
    command = [sys.executable, "-W", "ignore", program, TWINS]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert [line.partition(" elements")[0] for line in ran.stdout.splitlines()] == [
        "nothing",
        "load of 1 of 8",
        "store of 1 of 8",
    ], ran.stderr


COPY_TOO_FAR = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, triton, triton.language as tl
from bounds import checked

@triton.jit
def copy(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))

x = torch.zeros(16)
with checked():
    for given in ((x[:8], x[8:]), (x[:7], x[8:]), (x[:8], x[9:])):
        try:
            copy[(1,)](*given, BLOCK=8)
            print("nothing")
        except Exception as error:
            print(str(error.__cause__))
"""


# A module of twins of which one test fails, one is skipped, and one ends its process, which costs no other.
TWIN = """
import os, pytest, triton

def test_interpreted(device):
    assert device == "cpu" and os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.parametrize("number", [1, 2])
def test_of_numbers(number):
    assert number == 1, "number is not one"

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

def test_lost():
    os._exit(7)

def test_after_it():
    assert os.environ["TRITON_INTERPRET"] == "1"
"""


@pytest.mark.skipif(bool(gpu_count()), reason="a process with a GPU runs the twins itself")
def test_twins_report_what_a_process_that_interprets_found(tmp_path: Path) -> None:
    folder = tmp_path / "kernel_twins"
    folder.mkdir()
    (folder / "conftest.py").write_text((TWINS / "conftest.py").read_text())
    (folder / "bounds.py").write_text((TWINS / "bounds.py").read_text())
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.append({str(tmp_path)!r})\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    (folder / "test_twin.py").write_text(TWIN)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-n", "0", "-rA", str(folder)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = set(re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) .*?(?:::(\S+)|: (not today)$)", ran.stdout, re.MULTILINE))
    assert said == {
        ("PASSED", "test_interpreted", ""),
        ("PASSED", "test_of_numbers[1]", ""),
        ("FAILED", "test_of_numbers[2]", ""),
        ("SKIPPED", "", "not today"),
        ("FAILED", "test_lost", ""),
        ("PASSED", "test_after_it", ""),
    }, ran.stdout
    assert "number is not one" in ran.stdout and "ended with 7" in ran.stdout
    assert ran.returncode == 1
