"""The benchmarks run from end to end where there is no GPU, and a wrong answer is seen before it is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.nightly
FOLDER = Path(__file__).parent.parent / "benchmarks"
RIVALS = ("transformers grouped_mm", "torch grouped_mm")
KERNELS = {"experts", "gate_up", "down", "route", "align", "layer", "combine", "capture", "logits", "pad", "unpad"}

# Each answer as it is, of which nothing is wrong, and spoilt; in a process of its own, which interprets.
SPOILT = """
import json, sys
sys.path.append(sys.argv[1])
from kernel_cases import KERNELS, fault, ours
from kernel_inputs import make_batches
from model_shapes import MODELS, make_weights, tiny
model = next(tiny(model) for model in MODELS if model.name == "nemotron-padded")
weights, found = make_weights(model, "cpu"), {}
for kernel in KERNELS:
    batch = make_batches(kernel, model, 5, "cpu")[0]
    answer = ours(kernel, model, weights)(batch)
    found[kernel] = [fault(kernel, answer, batch, weights)]
    first = answer if hasattr(answer, "shape") else answer[0]
    first[0] = first[-1].clone()
    found[kernel].append(fault(kernel, answer, batch, weights))
print(json.dumps(found))
"""

# The targets as on a GPU, by a clock of our own: each call takes 1 us, and a launcher that is named so many more.
SLOWED = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("bench", sys.argv[1])
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
import kernel_cases
now = [0.0]

def slowed(right, more):
    def call(*args, **kwargs):
        now[0] += more
        return right(*args, **kwargs)
    return call

def timed(call, graph, milliseconds):
    began = now[0]
    call()
    return [1.0 + now[0] - began] * 3

for name, more in json.loads(sys.argv[2]).items():
    setattr(kernel_cases, name, slowed(getattr(kernel_cases, name), more))
bench.timed = timed
bench.measured_rates = lambda: bench.Rates(1e3, 1e3)  # any kernel is faster than this floor
sys.argv[1:] = []
bench.main(["--targets", "--seconds", "300"])
"""

# Without a GPU: a launch that compiles, told by the compiler's own listener, and then finds no device.
AHEAD = """
import json, sys
sys.path += sys.argv[1:3]
import torch, triton, launches, shapes
from compilers import Compilers
target = next(target for target in launches.TARGETS if target.name == "sm_90")
triton.runtime.driver.set_active(target)
hits = []
launch = [shapes.resized("pad", dtype, 63, 24, 64) for dtype in (torch.int8, torch.int16)]
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
with torch.device("meta"):
    Compilers(2).compile([lambda: launch[0].run(target)], 60.0)
    for shape in launch:
        try:
            shape.run(target)
        except AttributeError:
            pass
print(json.dumps(hits))
"""


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=os.environ | hidden, capture_output=True, text=True, timeout=300
    )


def test_every_kernel_is_timed_after_its_answer_was_found_right(tmp_path: Path) -> None:
    ran = run(FOLDER / "kernels.py", "--model", "nemotron-padded", "--tokens", "5", "--out", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No column says how fast a kernel is" in ran.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["how"] == "interpreted" and row["us"] > 0 for row in rows)
    (experts,) = [row for row in rows if row["kernel"] == "experts"]
    assert {"torch eager", "torch grouped_mm", "torch.compile"} <= experts["contenders"].keys()
    unanswered = [entry for row in rows for entry in row["contenders"].values() if "wrong" in entry or "error" in entry]
    assert not unanswered


def test_rows_that_do_not_fit_the_time_are_listed() -> None:
    ran = run(FOLDER / "kernels.py", "--model", "gemma4", "--tokens", "1", "--seconds", "1e-9")
    assert ran.returncode == 0, ran.stderr
    assert "route gemma4 T=1" in ran.stdout and "out of time" in ran.stdout


def test_an_answer_that_has_another_row_in_place_of_the_first_is_wrong() -> None:
    ran = run("-c", SPOILT, FOLDER / "timed")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.keys() == KERNELS
    assert [kernel for kernel, (right, _) in found.items() if right is not None] == []
    assert [kernel for kernel, (_, spoilt) in found.items() if spoilt is None] == []


def test_slow_kernels_are_named_by_the_targets_and_no_others() -> None:
    ran = run("-c", SLOWED, FOLDER / "kernels.py", json.dumps({"route_logits": 5, "routed_experts": 1, "layer": 20}))
    assert ran.returncode == 1, ran.stderr
    named = [line.partition(", ")[0] for line in ran.stderr.splitlines() if "MET" in line or "JUDGED" in line]
    assert sorted(named) == sorted([
        *(f"NOT MET: experts gemma4 T={tokens}: 2.00 us" for tokens in (8, 64, 4096, 1) for _ in RIVALS),
        *(f"NOT MET: route gemma4 T={tokens}: 6.00 us" for tokens in (8, 64, 1)),
        "NOT MET: layer gemma4 T=1: 21.0 us",
    ])  # fmt: skip


@pytest.mark.parametrize("readings, clocks, words", (
    ("1980, 2619, 97\n1755, 2619, 80\n1965, 2619, 99\n345, 1593, 0\n[N/A], 1593, 0\n",
     {"sm": [1755, 1965, 1980], "memory": [2619, 2619, 2619], "readings": 3},
     "While timing: SM 1965 MHz (1755 to 1980), memory 2619 MHz (2619 to 2619), 3 readings."),
    ("345, 1593, 0\n", {"note": "no reading of a device at work among 1 by nvidia-smi"}, "Clocks not recorded: no r"),
    (None, {"note": "nvidia-smi: No such file or directory"}, "Clocks not recorded: nvidia-smi: No such file"),
))  # fmt: skip
def test_clocks_are_recorded_while_timing(
    tmp_path: Path, readings: str | None, clocks: dict[str, object], words: str
) -> None:
    """By a driver's tool that is a script; where there is none, that is said."""
    if readings is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{readings}'\nexec /bin/sleep 60\n")
        tool.chmod(0o755)
    options = ("--model", "gemma4", "--tokens", "1", "--kernel", "capture", "--out", tmp_path)
    ran = run(FOLDER / "kernels.py", *options, PATH=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert words in ran.stdout and json.loads((tmp_path / "kernels.json").read_text())["clocks"] == clocks


def test_what_other_processes_compile_is_not_compiled_again(tmp_path: Path) -> None:
    """The second launch has nobody compiled."""
    folders = (FOLDER / "timed", FOLDER.parent / "tools")
    ran = run("-c", AHEAD, *folders, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [True, False]


def test_tuning_without_a_gpu_writes_nothing(tmp_path: Path) -> None:
    refused = run(FOLDER / "tune.py", "--out", tmp_path / "tuned")
    assert refused.returncode == 2 and "--dry-run" in refused.stderr
    ran = run(FOLDER / "tune.py", "--model", "mixtral", "--dry-run", "--out", tmp_path / "tuned")
    assert ran.returncode == 0, ran.stderr
    assert "mixtral T=5" in ran.stdout and "nothing written" in ran.stdout
    assert not (tmp_path / "tuned").exists()
