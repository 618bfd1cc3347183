"""`tools/aot.py` compiles for GPUs that are not here, in a process of its own: it replaces what registers operators."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from moe_conformance.engine import FusedShared, RoutingSpec

COMMAND = Path(__file__).parents[1] / "tools" / "aot.py"
TABLE = COMMAND.with_name("aot.md")
# Both products of one model on a target of each vendor.
ROWS = ["--only", "Gemma 4 26B-A4B T 64", "--target", "sm_90", "--target", "gfx942"]
# The registers of one of them, kept as fewer than any such kernel has.
REGISTERS = r"(?<=\| gate_up \| Gemma 4 26B-A4B T 64 \| sm_90 \| )([^|]+\| )\d+"
FAILURE = r"^gate_up Gemma 4 26B-A4B T 64 sm_90: registers: got \d+, want at most 24, for 16 are kept"

KEPT = re.search(r"with triton ([\d.]+\d)", TABLE.read_text())[1]
other_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None and version("triton") != KEPT,
    reason=f"figures are kept for triton {KEPT}, and no others are compared with them",
)

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    table = tmp_path_factory.mktemp("aot") / "aot.md"
    table.write_text(re.sub(REGISTERS, r"\g<1>16", TABLE.read_text()))
    command = [sys.executable, COMMAND, *ROWS, "--table", table]
    return subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, timeout=300)


def test_four_kernels_compile_for_two_targets_that_are_not_here(ran: subprocess.CompletedProcess[str]) -> None:
    assert "4 compiled" in ran.stdout, ran.stdout + ran.stderr


@other_triton
def test_a_figure_worse_than_the_kept_one_fails_the_command(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 1
    assert re.search(FAILURE, ran.stderr, re.MULTILINE), ran.stderr


@other_triton
def test_whatever_else_was_compiled_meets_its_guards(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.stdout.rstrip().endswith("1 failures"), ran.stderr


# Every value of each switch that the router's kernel is compiled for, over the shapes.
SWITCHES = f"""
import json, sys
sys.path.append({str(COMMAND.parent)!r})
from shapes import launches
found = {{}}
for launch in launches("route ", frozenset({{"sm_90"}})):
    for switch, value in launch.constants.items():
        found.setdefault(switch, set()).add(value)
print(json.dumps({{switch: sorted(values, key=str) for switch, values in found.items()}}))
"""


def test_the_routers_kernel_is_compiled_with_every_switch_in_every_position() -> None:
    command = [sys.executable, "-c", SWITCHES]
    compiled = json.loads(subprocess.check_output(command, env=os.environ.copy(), text=True, timeout=120))

    for switch, field in {"SCORE": "score", "SELECTOR": "selector", "RENORMALIZE": "renormalize"}.items():
        values = set(get_args(get_type_hints(RoutingSpec)[field])) - {"product_keys"}  # which looks beyond one row
        assert set(compiled[switch]) == values, switch
    assert set(compiled["FUSED_RULE"]) == set(get_args(get_type_hints(FusedShared)["rule"]))
    booleans = [switch for switch, values in compiled.items() if isinstance(values[0], bool)]
    assert len(booleans) >= 8
    assert not [switch for switch in booleans if compiled[switch] != [False, True]]
