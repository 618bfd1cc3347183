"""What is asked of the kernels' times on a GPU is judged as it is said, whatever the clock has shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "timed"))

from table import RIVALS, TARGETS, targets

# Microseconds of each kernel at T = 1, of experts at any T; the floor of experts is 80.
TIMES = {"experts": 100.0, "layer": 50.0, "logits": 3.0, "gate_up": 20.0, "down": 12.0, "combine": 2.0}


def timed(kernel: str, tokens: int, us: float) -> dict[str, Any]:
    row = {"kernel": kernel, "model": "gemma4", "tokens": tokens, "us": us, "floor_us": 80.0, "launches": 1}
    rivals = {name: {"us": 120.0} for name in RIVALS} if kernel == "experts" else {}
    return row | {"contenders": rivals, "aligned": False}


def rows(**slow: float) -> list[dict[str, Any]]:
    times = {"route": 2.0, "align": 2.5, "capture": 1.5} | TIMES | slow
    return [timed(kernel, tokens, times[kernel]) for kernel, tokens in TARGETS]


def missed(found: list[dict[str, Any]]) -> list[str]:
    return [line for line in targets(found, whole=True) if not line.startswith("met: ")]


def test_every_target_is_met_by_fast_kernels() -> None:
    fast = [row | {"floor_us": 95.0} for row in rows()]
    assert missed(fast) == []
    # Two rivals of each of four sizes, three shares of the floor, three kernels at three sizes, one layer.
    assert len(targets(fast, whole=True)) == 8 + 3 + 9 + 1


@pytest.mark.parametrize("kernel, us, words", (
    ("route", 4.5, "route gemma4 T=8: 4.50 us, 1 launches; want 3 us at most in one"),
    ("align", 3.1, "align gemma4 T=64: 3.10 us"),
    ("capture", 30.0, "capture gemma4 T=1: 30.0 us"),
    ("experts", 200.0, "experts gemma4 T=4096: 0.47 of the floor, want 0.5"),
    ("experts", 125.0, "experts gemma4 T=8: 125 us, torch grouped_mm 120; want no more"),
    ("layer", 51.0, "layer gemma4 T=1: 51.0 us, its kernels 39.0; want at most 1.3 times that"),
))  # fmt: skip
def test_a_slow_kernel_is_named(kernel: str, us: float, words: str) -> None:
    found = missed([row | {"floor_us": 95.0} for row in rows(**{kernel: us})])
    assert any(line.startswith(f"NOT MET: {words}") for line in found)
    assert all(f" {kernel} gemma4 " in line for line in found)


def test_two_launches_are_one_too_many() -> None:
    found = [row | ({"launches": 2} if row["kernel"] == "align" else {"floor_us": 95.0}) for row in rows()]
    assert len(missed(found)) == 3 and all("align" in line and "2 launches" in line for line in missed(found))


def test_what_could_not_be_timed_is_not_met_in_silence() -> None:
    found = [row | {"floor_us": 95.0} for row in rows()]
    route, experts = (next(row for row in found if row["kernel"] == kernel) for kernel in ("route", "experts"))
    del route["us"]
    route["error"] = "OutOfResources"
    experts["contenders"][RIVALS[0]] = {"note": "out of time"}
    lines = missed(found)
    assert "NOT JUDGED: route gemma4 T=8: ERROR: OutOfResources" in lines
    assert any(line.startswith(f"NOT JUDGED: experts gemma4 T=8: 100 us, {RIVALS[0]} no time") for line in lines)
    assert any(
        line.startswith("NOT JUDGED: layer") for line in missed([row for row in found if row["kernel"] != "down"])
    )
    assert [line for line in targets(found) if line.startswith("NOT JUDGED")] == []
