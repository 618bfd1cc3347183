"""`tools/twins.py` names the kernel that is wrong, hangs or dies, and goes on with all others."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import twins
from twins import KERNELS, Limits, Result, judged

pytestmark = pytest.mark.nightly

# A process that goes through three cases, of which `two` is what it is told to be.
FAKE = """
import json, os, sys, time
kind, kernel, dtype, *done = sys.argv[1:]
if kind == "start":
    sys.exit("no torch")
if kind == "sleeps":
    time.sleep(60)
for name in ("one", "two", "three"):
    if name in done:
        continue
    print("noise of a library")
    print(json.dumps({"begins": name}), flush=True)
    if name == "two" and kind == "hangs":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)
    if name == "two" and kind == "crashes":
        os.abort()
    bad = name == "two" and kind in ("wrong", "error")
    print(json.dumps({"case": name, "verdict": kind if bad else "right", "message": "x" * bad}), flush=True)
    if bad and kind == "error":
        print(json.dumps({"ends": "error"}), flush=True)
        sys.exit()
print(json.dumps({"ends": "all"}), flush=True)
if kind == "sanitizer":
    print("Invalid __global__ read of size 4")
    sys.exit(9)
"""


def ran(kind: str, seconds: float = 30.0) -> list[Result]:
    found: list[Result] = []
    limits = Limits(1.0, 10.0, time.monotonic() + seconds)
    judged("combine", "float16", limits, found.append, [sys.executable, "-c", FAKE, kind])
    return found


def outcomes(found: list[Result]) -> dict[str, str]:
    assert {(result.kernel, result.dtype) for result in found} == {("combine", "float16")}
    return {result.case: result.verdict for result in found}


def test_all_cases_of_a_sound_kernel_are_right() -> None:
    assert outcomes(ran("right")) == {"one": "right", "two": "right", "three": "right"}


@pytest.mark.parametrize("kind, verdict, words", (
    ("wrong", "wrong", "x"),
    ("error", "error", "x"),
    ("hangs", "hung", "waiting"),
    ("crashes", "died", "process ended with -6"),
))  # fmt: skip
def test_a_case_costs_itself_alone(kind: str, verdict: str, words: str) -> None:
    found = ran(kind)
    assert outcomes(found) == {"one": "right", "two": verdict, "three": "right"}
    assert words in next(result.message for result in found if result.case == "two")


def test_a_process_that_does_not_start_is_named_once() -> None:
    (only,) = ran("start")
    assert (only.case, only.verdict) == ("start", "died") and "no torch" in only.message


def test_what_a_sanitizer_finds_is_told_where_all_answers_are_right() -> None:
    found = ran("sanitizer")
    assert outcomes(found) == {"one": "right", "two": "right", "three": "right", "end": "died"}
    assert "process ended with 9; " in found[-1].message and "Invalid __global__ read" in found[-1].message


def test_time_that_is_up_is_no_hang() -> None:
    assert outcomes(ran("sleeps", 0.5)) == {"start": "not reached"}
    assert outcomes(ran("right", 0.0)) == {"all": "not reached"}


def test_every_result_is_written_as_it_comes_and_what_is_bad_comes_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "prepare_environment", lambda: None)
    out = tmp_path / "new" / "twins.jsonl"
    arguments = ["--out", str(out), "--kernel", "combine", "--jobs", "2"]
    assert twins.main(arguments, [sys.executable, "-c", FAKE, "wrong"]) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["dtype"], line["case"], line["verdict"]) for line in lines) == [
        (dtype, case, "wrong" if case == "two" else "right")
        for dtype in ("bfloat16", "float16", "float32")
        for case in ("one", "three", "two")
    ]
    told = capsys.readouterr().out.splitlines()
    assert told[-4].startswith("6 right, 3 not") and all(line.startswith("wrong: combine ") for line in told[-3:])
    assert twins.main(arguments, [sys.executable, "-c", FAKE, "right"]) == 0


@pytest.mark.parametrize("option", ("--jobs", "--case-seconds", "--seconds"))
def test_limits_of_nothing_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        twins.main([option, "0"])
    assert f"{option}: got 0" in capsys.readouterr().err


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# The process of one kernel, with one launcher that is wrong in one element, or does not compile.
PLANTED = """
import sys
sys.path.append(sys.argv[1])
from importlib import import_module
import twins
module, name, kind = sys.argv[2:5]
module = import_module(f"moe_conformance.kernels.{module}")
right = getattr(module, name)

def planted(*args, **kwargs):
    if kind == "raises":
        raise RuntimeError("out of registers")
    answer = right(*args, **kwargs)
    tensor = answer if hasattr(answer, "shape") else answer[0]
    tensor[0] = tensor[-1].clone()
    return answer

setattr(module, name, planted)
twins.child(*sys.argv[5:7], sys.argv[7:])
"""


@needs_triton
@pytest.mark.parametrize("kernel, dtype, module, name, kind, verdict", (
    ("combine", "float16", "combine", "combine", "wrong", "wrong"),
    ("route", "bfloat16", "routing", "route_logits", "raises", "error"),
))  # fmt: skip
def test_a_planted_fault_is_named(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: str, module: str, name: str, kind: str, verdict: str
) -> None:
    """In the interpreter, by the real cases; without it, the same kernel is right in tests/kernel_twins."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found: list[Result] = []
    limits = Limits(60.0, 60.0, time.monotonic() + 120)
    folder = str(Path(twins.__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", PLANTED, folder, module, name, kind]
    judged(kernel, dtype, limits, found.append, command)
    assert found and {(result.kernel, result.dtype, result.verdict) for result in found} == {(kernel, dtype, verdict)}
    assert "out of registers" in found[0].message or "differ, first at [0, 0]" in found[0].message


@needs_triton
def test_every_kernel_has_cases_in_each_of_its_dtypes() -> None:
    from twin_cases import cases

    for kernel, dtypes in KERNELS.items():
        for dtype in dtypes:
            assert list(cases(kernel, dtype, "cpu")), f"{kernel} {dtype}"
    with pytest.raises(ValueError, match="'sort'"):
        list(cases("sort", "float32", "cpu"))
