"""The job that a GPU is lent for: order, limits, budget, going on after a kill, results that fit."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compile_cache
import gpu_job
import pytest
import step_process
from gpu_estimate import estimate
from gpu_steps import DEVICE, STEPS, Step, limit_of

TOOLS = Path(gpu_job.__file__).parent

pytestmark = pytest.mark.nightly

RUN = """
import json, sys
sys.path.append(sys.argv[1])
import gpu_job
from gpu_steps import Step
sys.exit(gpu_job.main(sys.argv[3:], [Step(**step) for step in json.loads(sys.argv[2])]))
"""
H200 = {"name": "NVIDIA H200", "free": 130 * 2**30, "versions": {"torch": "2.11.0"}, "lacks": {}}


def step(name: str, script: str, **fields: Any) -> dict[str, Any]:
    """A step of shell, which writes its name in trace each time that it begins; $OUT is its folder of results."""
    script = script.replace("{", "{{").replace("}", "}}")
    words = ["bash", "-c", f'OUT=$1; echo {name} >> "$TRACE"; {script}', "bash", "{out}"]
    return {"name": name, "command": words, "weight": 1, "limit": 20, "least": 0.1, **fields}


def device(**facts: Any) -> dict[str, Any]:
    return step(DEVICE, f"echo '{json.dumps(H200 | facts)}' > $OUT/facts.json", needs=(), memory=0)


class Runner:
    """The job as a process, whose steps are shell."""

    def __init__(self, folder: Path) -> None:
        self.out, self.trace, self.environment = (
            folder / "out",
            folder / "trace",
            os.environ | {"TRACE": f"{folder}/trace"},
        )

    def start(self, steps: list[dict[str, Any]], *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(TOOLS), json.dumps(steps), "--out", str(self.out), *options]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, steps: list[dict[str, Any]], *options: str) -> tuple[int, str]:
        process = self.start(steps, *options)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output + errors

    @property
    def begun(self) -> list[str]:
        return [name for name in self.trace.read_text().split() if name != DEVICE] if self.trace.exists() else []

    @property
    def outcomes(self) -> dict[str, str]:
        steps = json.loads((self.out / "state.json").read_text())["steps"]
        return {name: record["outcome"] for name, record in steps.items() if name != DEVICE}

    @property
    def summary(self) -> str:
        return (self.out / "summary.md").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "this never came"
        time.sleep(0.01)


def test_steps_run_in_order_and_what_is_done_is_not_run_again(job: Runner) -> None:
    steps = [device(), step("first", "echo 1 > $OUT/a.txt"), step("second", "echo no; exit 3"), step("third", "true")]
    code, output = job(steps)
    assert (code, job.begun) == (1, ["first", "second", "third"])
    assert "Failed: second" in output and "Failed: second" in job.summary and "exit code 3" in job.summary
    code, _ = job(steps)
    assert (code, job.begun) == (1, ["first", "second", "third"])
    assert zipfile.ZipFile(job.out / "results.zip").read("first/a.txt") == b"1\n"


def test_a_job_whose_steps_are_all_right_exits_with_zero(job: Runner) -> None:
    code, output = job([device(), step("only", "true")])
    assert code == 0 and "none has failed" in output


def test_a_step_that_hangs_is_killed_with_all_its_processes_and_named(job: Runner) -> None:
    """Its children are in its group, but for one that has left it."""
    script = "sleep 77 & setsid sleep 77 & echo begun; echo $! > $OUT/left; wait"
    steps = [device(), step("hangs", script, limit=1), step("next", "true")]
    code, output = job(steps)
    assert code == 1 and job.begun == ["hangs", "next"]
    assert job.outcomes == {"hangs": "killed", "next": "ok"}
    assert "Killed at its limit: hangs" in output and "begun" in job.summary
    left = int(zipfile.ZipFile(job.out / "results.zip").read("hangs/left"))
    until(lambda: not Path(f"/proc/{left}/cmdline").exists() or not Path(f"/proc/{left}/cmdline").read_bytes())


def test_a_step_that_leaves_a_process_behind_does_not_wait_for_it(job: Runner) -> None:
    began = time.monotonic()
    code, _ = job([device(), step("leaves", "sleep 30 & true")])
    assert code == 0 and time.monotonic() - began < 15


def test_what_was_not_reached_is_named_and_comes_in_the_next_call(job: Runner) -> None:
    steps = [device(), step("slow", "sleep 1.2"), step("late", "true", least=25), step("small", "true")]
    code, output = job(steps, "--budget", "24")
    assert code == 3 and job.begun == ["slow", "small"]
    assert "Not reached: late (" in output and "| late | not reached |" in job.summary
    code, _ = job(steps)
    assert code == 0 and job.begun == ["slow", "small", "late"]


def test_a_step_that_used_up_its_limit_comes_behind_those_that_have_not_begun(job: Runner) -> None:
    late = step("late", "true", least=25)
    job([device(), step("hangs", "sleep 77", limit=1), late], "--budget", "20")
    assert job.begun == ["hangs"]
    job([device(), step("hangs", "sleep 77", limit=1), late])
    assert job.begun == ["hangs", "late", "hangs"]


NAMES = (DEVICE, "first", "second", "third")


def writing(slow: str = "") -> list[dict[str, Any]]:
    """Steps that write one file in two parts; the slow one waits between them."""
    found = []
    for name in NAMES:
        facts = f"echo '{json.dumps(H200)}' > $OUT/facts.json; " if name == DEVICE else ""
        wait = "sleep 60" if name == slow else "true"
        script = f"{facts}echo half > $OUT/half; {wait}; echo whole > $OUT/half"
        found.append(step(name, script, needs=(), memory=0))
    return found


def whole(job: Runner) -> bool:
    results = zipfile.ZipFile(job.out / "results.zip")
    return [results.read(f"{name}/half") for name in NAMES] == [b"whole\n"] * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_killed_in_a_step_runs_it_again_and_no_other(job: Runner, name: str) -> None:
    process = job.start(writing(slow=name))
    until(lambda: job.trace.exists() and name in job.trace.read_text().split())
    time.sleep(random.Random(name).uniform(0, 1))
    process.kill()
    process.communicate()
    code, output = job(writing())
    assert code == 0 and whole(job), output
    assert f"{name}: the last call was killed while it ran" in output
    assert job.begun == [other for other in NAMES[1:] for _ in range(1 + (other == name))]


@pytest.mark.parametrize("seed", range(8))
def test_a_job_killed_at_any_moment_loses_a_step_at_most(job: Runner, seed: int) -> None:
    """Between two steps, too, and while it writes."""
    process = job.start(writing())
    until(lambda: job.trace.exists())
    time.sleep(random.Random(seed).uniform(0, 0.25))
    process.kill()
    process.communicate()
    code, output = job(writing())
    assert code == 0 and whole(job), output
    assert set(job.begun) == set(NAMES[1:]) and len(job.begun) <= len(NAMES)


def test_what_a_killed_job_left_running_is_ended_by_the_next(job: Runner) -> None:
    steps = [device(), step("first", "setsid sleep 77 & sleep 77")]
    process = job.start(steps)
    until(lambda: job.begun)
    mark = json.loads((job.out / "state.json").read_text())["running"]["mark"]
    until(lambda: len(list(step_process.marked(mark))) == 3)
    process.kill()
    process.communicate()
    until(lambda: len(list(step_process.marked(mark))) < 3)  # the step itself, with its parent
    _, output = job([device(), step("first", "true")])
    assert "2 processes of it were still there" in output
    assert not list(step_process.marked(mark))


def test_a_signal_ends_the_step_and_the_summary_says_so(job: Runner) -> None:
    steps = [device(), step("first", "echo here; touch $OUT/a; sleep 77"), step("second", "true")]
    process = job.start(steps)
    until(lambda: job.begun and (job.out / "now" / "a").exists())
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Cut short: first" in job.summary and "Not reached: second (the job was ended by SIGTERM)" in job.summary
    assert job.outcomes == {"first": "interrupted"}
    job([device(), step("first", "true"), step("second", "true")])
    assert job.begun == ["first", "first", "second"] and "Every step is done" in job.summary
    assert zipfile.ZipFile(job.out / "results.zip").namelist() == ["device/facts.json"]


def test_results_are_few_small_and_flat(job: Runner) -> None:
    """Whatever a step writes."""
    large = "mkdir -p $OUT/a/b/c/d; for i in $(seq 50); do echo $i > $OUT/a/b/c/d/$i; done"
    noise = "head -c 20000000 /dev/urandom > $OUT/large; head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end"
    code, _ = job([device(), step("large", f"{large}; {noise}"), step("other", "echo '# read me' > $OUT/own.md")])
    assert code == 0 and "left out, for results.zip would be too large: large" in job.summary
    assert "# read me" in job.summary
    files = [path for path in job.out.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["log.txt", "results.zip", "state.json", "summary.md"]
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert "large/a/b/c/d/50" in zipfile.ZipFile(job.out / "results.zip").namelist()
    log = (job.out / "log.txt").read_text()
    assert len(log) < 400_000 and "bytes left out" in log and "the end\n" in log


def test_the_log_of_many_calls_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * (step_process.WHOLE + 1))
    step_process.Log(path, "next").close()
    assert path.stat().st_size < 0.6 * step_process.WHOLE
    assert path.read_text().endswith("==== next\n\n")


COMPILED = """
import json, sys, triton, launches, shapes, figures
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
figures.compiled(next(shapes.launches("resize", frozenset({"sm_90"}))))
print(json.dumps(hits))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_was_packed_triton_takes_from_another_folder(tmp_path: Path) -> None:
    """It keeps absolute paths. Of a kernel only what it reads again is packed."""

    def hits(folder: Path) -> object:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(TOOLS), "TRITON_INTERPRET": "0"}
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], env=environment, stdout=subprocess.PIPE)
        return json.loads(ran.stdout)

    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    assert hits(first) == [False]
    assert compile_cache.pack(first, tmp_path / "cache.zip", 2**24).startswith(
        "compile cache: 1 kernels, 0.0 MiB packed"
    )
    shutil.rmtree(first)
    assert compile_cache.unpack(tmp_path / "cache.zip", second).startswith("compile cache: 1 kernels, 0.0 MiB unpacked")
    assert hits(second) == [True]


def compiling(name: str, kernel: str) -> dict[str, Any]:
    folder = f'"$TRITON_CACHE_DIR"/{kernel}'
    return step(
        name, f"ls $TRITON_CACHE_DIR > $OUT/found; mkdir {folder}; echo 1 > {folder}/k.cubin; echo 2 > {folder}/k.ttir"
    )


def test_what_was_compiled_is_there_in_the_next_call(job: Runner) -> None:
    _, output = job([device(), compiling("first", "aaa")])
    assert "compile cache: none, a cold start" in output and "| first | ok |" in job.summary
    assert "compile cache: 1 kernels" in job.summary and " | 1 |  |" in job.summary
    assert zipfile.ZipFile(job.out / "cache.zip").namelist() == ["aaa/k.cubin"]
    _, output = job([device(), compiling("second", "bbb")])
    assert "compile cache: 1 kernels, 0.0 MiB unpacked" in output
    assert zipfile.ZipFile(job.out / "results.zip").read("second/found") == b"aaa\n"
    assert zipfile.ZipFile(job.out / "cache.zip").namelist() == ["aaa/k.cubin", "bbb/k.cubin"]


@pytest.mark.parametrize("damage", (b"PK", b"", b"no archive"))
def test_a_damaged_cache_costs_a_line_and_a_cold_start(job: Runner, damage: bytes) -> None:
    job([device(), compiling("first", "aaa")])
    (job.out / "cache.zip").write_bytes(damage)
    code, output = job([device(), compiling("second", "bbb")])
    assert code == 0 and output.count("cache.zip is damaged, a cold start") == 1
    assert zipfile.ZipFile(job.out / "results.zip").read("second/found") == b""
    assert zipfile.ZipFile(job.out / "cache.zip").namelist() == ["bbb/k.cubin"]


def test_a_cache_damaged_within_leaves_nothing(tmp_path: Path) -> None:
    folder, archive = tmp_path / "cache", tmp_path / "cache.zip"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "k.cubin").write_bytes(bytes(range(256)) * 64)
    compile_cache.pack(folder, archive, 2**24)
    data = bytearray(archive.read_bytes())
    data[60:90] = bytes(30)
    archive.write_bytes(data)
    shutil.rmtree(folder / "a")
    assert "is damaged, a cold start" in compile_cache.unpack(archive, folder) and not list(folder.iterdir())


def test_a_cache_that_is_too_large_keeps_what_came_first(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "cache" / f"entry{number}").mkdir(parents=True)
        (tmp_path / "cache" / f"entry{number}" / "k.cubin").write_bytes(random.Random(number).randbytes(300_000))
        os.utime(tmp_path / "cache" / f"entry{number}", (0, -number % 4))
    words = compile_cache.pack(tmp_path / "cache", tmp_path / "cache.zip", 2**20)
    assert "1 entries left out" in words and (tmp_path / "cache.zip").stat().st_size <= 2**20
    names = zipfile.ZipFile(tmp_path / "cache.zip").namelist()
    assert names == ["entry0/k.cubin", "entry3/k.cubin", "entry2/k.cubin"]


LACKS = {
    "no GPU": (
        {"lacks": {"gpu": "torch sees no GPU"}, "name": "no GPU"},
        {"gpu", "idle", "large"},
        "torch sees no GPU",
    ),
    "no triton": (
        {"lacks": {"triton": "triton is not installed"}},
        {"gpu", "idle", "large"},
        "triton is not installed",
    ),
    "busy": ({"lacks": {"idle": "the GPU is busy: 3.0 GiB in use by others"}}, {"idle"}, "3.0 GiB in use"),
    "little memory": ({"free": 5 * 2**30}, {"large"}, "5.0 GiB are free on the GPU, it wants 16"),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_can_run_runs_and_what_cannot_says_why(job: Runner, what: str) -> None:
    facts, unable, reason = LACKS[what]
    steps = [
        device(**facts),
        step("gpu", "true"),
        step("idle", "true", needs=("gpu", "triton", "idle")),
        step("large", "true", memory=16),
        step("host", "true", needs=(), memory=0),
    ]
    code, output = job(steps)
    assert code == 3 and reason in output
    assert {name for name, outcome in job.outcomes.items() if outcome == "unable"} == unable
    assert job.outcomes["host"] == "ok"
    code, _ = job([device(), *steps[1:]])
    assert code == 0 and set(job.outcomes.values()) == {"ok"}


def test_a_program_that_is_not_there_is_named(job: Runner) -> None:
    code, output = job([device(), step("checked", "true", needs=("gpu", "no-such-sanitizer"))])
    assert code == 3 and "checked (no-such-sanitizer is not on the PATH)" in output


def test_a_device_that_does_not_answer_leaves_what_needs_none(job: Runner) -> None:
    hung = step(DEVICE, "sleep 77", limit=0.3, needs=(), memory=0)
    code, output = job([hung, step("gpu", "true"), step("host", "true", needs=(), memory=0)])
    assert code == 1 and job.outcomes == {"gpu": "unable", "host": "ok"}
    assert "Killed at its limit: device" in output and "has not said what the GPU is" in output


def test_a_command_that_does_not_exist_is_a_failure(job: Runner) -> None:
    broken = step("broken", "") | {"command": ["/no/such/program"]}
    code, _ = job([device(), broken, step("next", "true")])
    assert code == 1 and job.outcomes == {"broken": "failed", "next": "ok"} and "/no/such/program" in job.summary


def test_results_of_other_sources_are_marked(job: Runner) -> None:
    job([device(), step("first", "true")])
    path = job.out / "state.json"
    path.write_text(path.read_text().replace(gpu_job.digest_of_sources(), "0123456789ab"))
    job([device(), step("first", "true"), step("second", "true")])
    assert "| first | ok |" in job.summary and job.summary.count("of other sources") == 1


@pytest.mark.parametrize("options, words", (
    (["--budget", "-1"], ("--budget", "-1", "above 0")),
    (["--budget", "0"], ("--budget", "above 0")),
    (["--budget", "nan"], ("--budget", "above 0")),
    (["--budget", "soon"], ("--budget", "soon")),
))  # fmt: skip
def test_a_budget_that_is_none_is_refused(job: Runner, options: list[str], words: tuple[str, ...]) -> None:
    code, output = job([device()], *options)
    assert code == 2 and all(word in output for word in words)
    assert not job.out.exists()


STATES = {
    "another version": ('{"version": 7, "mode": "GPU job", "steps": {}}', "version 7 and not 1"),
    "a rehearsal": ('{"version": 1, "mode": "rehearsal", "steps": {}}', "of a rehearsal, want of a GPU job"),
    "half a file": ('{"version": 1, "mo', "no JSON"),
    "a list": ("[1]", "a state file of list"),
    "other fields": ('{"version": 1, "mode": "GPU job", "steps": {"a": {"colour": 1}}}', "other fields"),
    "no steps": ('{"version": 1, "mode": "GPU job"}', "other fields"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_file_of_another_kind_is_refused_and_kept(job: Runner, what: str) -> None:
    text, words = STATES[what]
    job.out.mkdir()
    (job.out / "state.json").write_text(text)
    code, output = job([device(), step("first", "true")])
    assert code == 2 and words in output and "choose another --out" in output
    assert (job.out / "state.json").read_text() == text and job.begun == []


def test_a_results_folder_that_is_a_file_is_refused(job: Runner) -> None:
    job.out.write_text("mine")
    code, output = job([device()])
    assert code == 2 and "which is a file" in output and job.out.read_text() == "mine"


def test_another_state_of_the_code_than_the_checkouts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from wheels that were made before a kernel was changed."""
    find = importlib.util.find_spec
    shutil.copytree(TOOLS.parent / "kernels", tmp_path / "kernels")
    (tmp_path / "kernels" / "combine.py").write_text("# as it was")
    changed = SimpleNamespace(origin=f"{tmp_path}/kernels/__init__.py")
    by_name = lambda name: changed if name == "moe_conformance.kernels" else find(name)  # noqa: E731
    monkeypatch.setattr(gpu_job.importlib.util, "find_spec", by_name)
    with pytest.raises(SystemExit, match="2"):
        gpu_job.main(["--out", str(tmp_path / "out")], [])
    assert f"got another kernels/combine.py in {tmp_path}, want this checkout's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_jobs_do_not_share_a_folder(job: Runner) -> None:
    process = job.start([device(), step("first", "sleep 77")])
    until(lambda: job.begun)
    code, output = job([device(), step("first", "true")])
    process.terminate()
    process.communicate(timeout=20)
    assert code == 2 and "another job is at work" in output and job.begun == ["first"]


def test_the_budget_is_shared_by_weight_within_limits() -> None:
    steps = [
        Step("heavy", (), weight=3, limit=1000, least=10),
        Step("short", (), weight=2, limit=5, least=1),
        Step("needy", (), weight=0.01, limit=1000, least=60),
        Step("large", (), weight=1, limit=1000, least=200),
    ]
    assert limit_of(steps[0], steps, 100.0) == pytest.approx(100 * 3 / 6.01, abs=0.1)
    assert limit_of(steps[1], steps[1:], 100.0) == 5
    assert limit_of(steps[2], steps[2:], 100.0) == 60
    assert limit_of(steps[3], steps[3:], 100.0) is None
    assert limit_of(steps[0], steps, math.inf) == 1000


ESTIMATED = {"device": 5.0, "launches": 80.0, "targets": 6.0, "triton": 80.0, "reference": 60.0, "transformers": 60.0}


def test_the_steps_down_to_the_tuning_fit_by_the_estimate() -> None:
    """By what a rehearsal took; by ten times as much not, and then it is said which."""
    text = "\n".join(estimate(STEPS, ESTIMATED))
    # 10 s to start, 80 s on sixteen cores, unevenly, and half a second for each of 13 kernels, one after the other.
    assert "| launches | 80 | 112 | 13 | 26 |" in text
    assert "The steps down to tuning fit: they end at" in text and "100% of its 4163" not in text
    slow = {name: 10 * seconds for name, seconds in ESTIMATED.items()}
    assert "do not fit: device needs 60 s and gets 30" in "\n".join(estimate(STEPS, slow))
    del slow["triton"]
    assert "| triton | not rehearsed |" in "\n".join(estimate(STEPS, slow))


def test_tuned_tiles_go_where_the_installed_kernels_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "moe_conformance"
    (package / "kernels").mkdir(parents=True)
    monkeypatch.setattr(gpu_job.importlib.util, "find_spec", lambda _: SimpleNamespace(origin=f"{package}/__init__.py"))
    now = tmp_path / "now" / "tuned"
    now.mkdir(parents=True)
    (now / "NVIDIA_H200.json").write_text("{}")
    gpu_job.add_results(tmp_path / "results.zip", "tuning", now.parent)
    gpu_job.place_tuned(tmp_path / "results.zip")
    assert (package / "kernels" / "tuned" / "NVIDIA_H200.json").read_text() == "{}"


def test_every_step_is_named_once_and_its_files_are_there() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS) and STEPS[0].name == DEVICE
    for own in STEPS:
        for word in (*own.command, *own.rehearsal):
            word.format(python="", out="", seconds="", jobs="", workers="")
            if word.startswith(("tools/", "tests/", "benchmarks/", "ci/")):
                assert (TOOLS.parent / word).exists(), f"{own.name}: {word}"
