"""The kernels, interpreted on the CPU in processes of their own: this one's environment is left alone."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TWINS = Path(__file__).with_name("kernel_twins")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def checks(group: str) -> list[str]:
    """Names of the public functions of a group that take a device, read without importing triton here."""
    tree = ast.parse((TWINS / f"twins_{group}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return [node.name for node in functions if [argument.arg for argument in node.args.args] == ["device"]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is not None:
        metafunc.parametrize("check", [check for group in metafunc.cls.groups for check in checks(group)])


class Twins:
    """One process, and under xdist one worker, a class."""

    groups: tuple[str, ...]

    @pytest.fixture(scope="class")
    @classmethod
    def outcome(cls) -> dict[str, str | None]:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "TRITON_DEFAULT_FP_FUSION": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", TWINS, "cpu", *cls.groups]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    def test_interpreted(self, outcome: dict[str, str | None], check: str) -> None:
        assert outcome[check] is None, outcome[check]


class TestExperts(Twins):
    groups = ("experts", "float8")


class TestAllElse(Twins):
    groups = ("routing", "dispatch", "combine", "layer", "padding", "capture")


def test_every_group_has_its_class() -> None:
    groups = {group for cls in Twins.__subclasses__() for group in cls.groups}
    assert groups == {path.stem.removeprefix("twins_") for path in TWINS.glob("twins_*.py")}


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
