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


@pytest.mark.nightly
def test_a_light_interpreter_computes_what_the_plain_one_does(tmp_path: Path) -> None:
    """Every operator, on tensors of types that meet and that do not, in blocks of one shape and of two, and on numbers:
    plain, light where plans are made, and light where they are followed, with values that they were not made from."""
    program = tmp_path / "operators.py"
    program.write_text(OPERATORS)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-W", "ignore", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    planned, differing = ran.stdout.split(maxsplit=1)
    assert int(planned) > 50
    assert differing == "[]\n"


OPERATORS = """
import torch, triton, triton.language as tl
from moe_conformance.kernels import interpreter as light

@triton.jit
def operators(left_ptr, right_ptr, out_ptr, number_ptr, SIZE: tl.constexpr, INTEGERS: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a, b, one = tl.load(left_ptr + offs), tl.load(right_ptr + offs), tl.load(number_ptr)
    out_ptr += offs
    both = offs[:, None] * SIZE + offs[None, :]
    wide_ptr = out_ptr - offs + 64 * SIZE
    row = 0
    for left, right in ((a, b), (a, one), (one, b), (a, 3), (a, -2), (a[:, None], b[None, :])):
        if len(left.shape) == 2 or (hasattr(right, "shape") and len(right.shape) == 2):
            tl.store(wide_ptr + both, (left + right).to(tl.float32))
            tl.store(wide_ptr + SIZE * SIZE + both, (left < right).to(tl.float32))
        else:
            for got in (left + right, left - right, left * right, left < right, left <= right, left > right,
                        left >= right, left == right, left != right, right + left, right * left):
                tl.store(out_ptr + row * SIZE, got.to(tl.float32))
                row += 1
            if INTEGERS:
                for got in (left // right, left % right, left & right, left | right):
                    tl.store(out_ptr + row * SIZE, got.to(tl.float32))
                    row += 1
    if not INTEGERS:
        for got in (a + 0.1, 0.1 + a, a * 1e-3, a - 2.5, a < 0.75):
            tl.store(out_ptr + row * SIZE, got.to(tl.float32))
            row += 1
    tl.store(out_ptr + row * SIZE, ((a < b) & (a < 2) | (b == a)).to(tl.float32))

def run(left, right):
    out = torch.full((80 * 8 + 2 * 64,), float("nan"))
    operators[(1,)](left, right, out, left[3:4].clone(), SIZE=8, INTEGERS=not left.is_floating_point() and not
                    right.is_floating_point())
    return out.view(torch.int32)

# No bfloat16: the plain interpreter cannot use what a comparison of it gives.
types = (torch.int8, torch.int32, torch.int64, torch.float16, torch.float32)
pairs = [(left, right) for left in types for right in types]
seen, unseen = torch.tensor([[-7, -2, 3, 1, 5, -1, 90, 100], [-3, 2, 0, 1, 4, 4, -100, 0]])

def all_of_them(values):
    return {pair: run(values.to(pair[0]), values.flip(0).abs().clamp(1).to(pair[1])) for pair in pairs}

plain = [all_of_them(seen), all_of_them(unseen)]
light.make_light()
made, computed_as = [], light.computed_as
light.computed_as = lambda *given: made.append(computed_as(*given)) or made[-1]
got = [all_of_them(seen), all_of_them(unseen)]
print(sum(plan is not None for plan in made),
      [pair for pair in pairs for before, after in zip(plain, got) if not torch.equal(before[pair], after[pair])])
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


@pytest.mark.nightly
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
