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


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
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


def test_tuning_without_a_gpu_writes_nothing(tmp_path: Path) -> None:
    refused = run(FOLDER / "tune.py", "--out", tmp_path / "tuned")
    assert refused.returncode == 2 and "--dry-run" in refused.stderr
    ran = run(FOLDER / "tune.py", "--model", "mixtral", "--dry-run", "--out", tmp_path / "tuned")
    assert ran.returncode == 0, ran.stderr
    assert "mixtral T=5" in ran.stdout and "nothing written" in ran.stdout
    assert not (tmp_path / "tuned").exists()
