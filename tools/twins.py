"""Launch every kernel once for each dtype and compare it with its twin in reference_impl; one JSON line a result.

    python tools/twins.py --out results/twins.jsonl                 # compiled where there is a GPU, else interpreted
    python tools/twins.py --kernel combine --kernel layer --jobs 4

Each kernel in each dtype is a process of its own, as many at a time as there are cores, which compile in parallel. A
hang, a crash or a failed compile costs its own case: the process is ended, its case named, and another goes on behind
it. What is launched: twin_cases.py. Exits 1 unless every case is right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH, which ci/gpu.sh sets, leaves it out

FLOATS = ("float32", "float16", "bfloat16")
EXPERT_WEIGHTS = (*FLOATS, "float8 weights")
# The dtype is that of activations; of ids for align, of the buffer for capture. Those that compile longest come first.
KERNELS = {
    "experts": EXPERT_WEIGHTS,
    "layer": FLOATS,
    "gate_up": EXPERT_WEIGHTS,
    "down": EXPERT_WEIGHTS,
    "route": FLOATS,
    "combine": FLOATS,
    "align": ("int32", "int64"),
    "capture": ("uint8", "int16", "int32"),
    "resize": (*FLOATS, "float8_e4m3fn", "int64"),
}
CHILD = (sys.executable, str(Path(__file__).resolve()), "--child")
LAST_WORDS = 2000


@dataclass(frozen=True)
class Result:
    """verdict: right, wrong, error, hung, died or not reached. seconds: of the case, compiling included.

    compiles, compile_seconds: kernels that Triton compiled for it, None where it does not say.
    """

    kernel: str
    dtype: str
    case: str
    verdict: str
    seconds: float = 0.0
    message: str = ""
    compiles: int | None = None
    compile_seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.kernel} {self.dtype}, {self.case}" + f": {self.message}" * bool(self.message)


@dataclass(frozen=True)
class Limits:
    """case, start: seconds that a case may take, and a process before its first. deadline: of everything, monotonic."""

    case: float
    start: float
    deadline: float


def judged(
    kernel: str, dtype: str, limits: Limits, keep: Callable[[Result], None], command: Sequence[str] = CHILD
) -> None:
    """All cases of one kernel in one dtype, in as many processes as it takes."""
    done: list[str] = []

    def add(result: Result) -> None:
        done.append(result.case)
        keep(result)

    while time.monotonic() < limits.deadline:
        last = from_one_process(kernel, dtype, limits, add, [*command, kernel, dtype, *done])
        if last is None:
            return
        if last.verdict != "error":
            add(last)
        # If not even the first case ran, another process would do no better; after the last case none is needed.
        if last.case in ("start", "end") or last.verdict == "not reached":
            return
    keep(Result(kernel, dtype, "all that follows" if done else "all", "not reached", message="out of time"))


def from_one_process(
    kernel: str, dtype: str, limits: Limits, add: Callable[[Result], None], command: Sequence[str]
) -> Result | None:
    """Add its results as they come. returns what ended it too early, None where it went through all its cases."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )
        lines = lines_of(process.stdout)
        case, began, expires = "start", time.monotonic(), time.monotonic() + limits.start
        last: Result | None = None
        how = printed = ""
        line: str | None = ""
        while not how:
            try:
                line = lines.get(timeout=max(0.0, min(expires, limits.deadline) - time.monotonic()))
            except queue.Empty:
                how = "hung" if expires < limits.deadline else "not reached"
                process.kill()
                if process.stdin:
                    process.stdin.close()  # which ends the process that a sanitizer runs, too
                break
            message = parsed(line)
            if line and not message:  # a sanitizer's report
                printed = (printed + line)[-LAST_WORDS:]
            if line is None:
                how = "died"
            elif message.get("ends"):
                how = message["ends"]
            elif message.get("begins") or message.get("verdict"):
                case = message.get("begins", "end")
                began, expires = time.monotonic(), time.monotonic() + limits.case
                if message.get("verdict"):
                    last = Result(kernel, dtype, **message)
                    add(last)
        code, seconds = wait(process), round(time.monotonic() - began, 3)
        if how == "all" and code == 0:
            return None
        if how == "error":  # that case has its result; the device's state after an error is unknown
            return last
        why = f"no answer in {seconds:.0f} s" if how in ("hung", "not reached") else f"process ended with {code}"
        with contextlib.suppress(queue.Empty):  # a sanitizer reports when its process ends
            while line is not None and (line := lines.get(timeout=5)) is not None:
                printed += line
        errors.seek(0)
        words = (printed + errors.read())[-LAST_WORDS:].strip()
        return Result(kernel, dtype, case, "died" if how == "all" else how, seconds, f"{why}; {words}".rstrip("; "))


def lines_of(stream: IO[str] | None) -> queue.Queue[str | None]:
    """Its lines as they come; None after the last."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream or ():
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def parsed(line: str | None) -> dict[str, Any]:
    """A message of the process; empty for anything else that was printed there."""
    try:
        message = json.loads(line or "")
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def wait(process: subprocess.Popen[str]) -> int:
    """Its exit code; a process that does not end by itself is ended."""
    try:
        return process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def child(kernel: str, dtype: str, done: Sequence[str]) -> None:
    """In its own process: the cases that are not done, said before each and behind each; ends at the first error."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    # What a library prints must not come between.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    import torch
    from twin_cases import cases

    from moe_conformance.errors import Nonconformance
    from moe_conformance.kernels.interpreter import make_light
    from moe_conformance.kernels.launch import interpreted

    make_light()
    torch.set_num_threads(1)
    compiled = listening()
    with torch.no_grad():
        for name, check in cases(kernel, dtype, "cpu" if interpreted() else "cuda"):
            if name in done:
                continue
            say(begins=name)
            began, before = time.perf_counter(), None if compiled is None else len(compiled)
            verdict, words = "right", ""
            try:
                check()
                if not interpreted():
                    torch.cuda.synchronize()
            except Nonconformance as wrong:
                verdict, words = "wrong", str(wrong)
            except Exception as error:  # of a compiler, a driver, anybody
                verdict, words = "error", f"{type(error).__name__}: {str(error)[:LAST_WORDS]}"
            counted = {}
            if compiled is not None:
                counted = {"compiles": len(compiled) - (before or 0), "compile_seconds": sum(compiled[before:])}
            seconds = round(time.perf_counter() - began, 3)
            say(case=name, verdict=verdict, seconds=seconds, message=words, **counted)
            if verdict == "error":
                say(ends="error")
                return
    say(ends="all")


def end_with_parent() -> None:
    """Standard input ends with the process at its other end."""
    while os.read(0, 1):  # not sys.stdin, whose lock the end of this process would want
        pass
    os._exit(1)


def listening() -> list[float] | None:
    """Seconds of each compilation of this process from now on; None with a Triton that has no listener for it."""
    import triton

    knobs: Any = getattr(getattr(triton, "knobs", None), "compilation", None)
    if not hasattr(knobs, "listener"):
        return None
    seconds: list[float] = []

    def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seconds.append(round(times.total / 1e6, 3))

    knobs.listener = compiled
    return seconds


def wanted(kernels: Sequence[str]) -> Iterator[tuple[str, str]]:
    for kernel, dtypes in KERNELS.items():
        if not kernels or kernel in kernels:
            yield from ((kernel, dtype) for dtype in dtypes)


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = CHILD) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines, written as they come")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="nothing else; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (a core each)")
    parser.add_argument("--under", default="", metavar="WORDS", help="a program that runs each process, as a sanitizer")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="that a case may take (60)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="that everything may take (3600)")
    options = parser.parse_args(arguments)
    for name in ("jobs", "case_seconds", "seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, want more than 0")
    prepare_environment()
    limits = Limits(options.case_seconds, max(60.0, options.case_seconds), time.monotonic() + options.seconds)
    results: list[Result] = []
    lock = threading.Lock()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("")

    def keep(result: Result) -> None:
        with lock:
            results.append(result)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
            if result.verdict == "right":
                print(f"{result}, {result.seconds} s", flush=True)

    units: queue.Queue[tuple[str, str]] = queue.Queue()
    for unit in wanted(options.kernel or ()):
        units.put(unit)

    def work() -> None:
        while True:
            try:
                kernel, dtype = units.get_nowait()
            except queue.Empty:
                return
            judged(kernel, dtype, limits, keep, [*shlex.split(options.under), *command])

    began = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told(results, time.monotonic() - began)


def told(results: Sequence[Result], seconds: float) -> int:
    """Failures come last, where the end of a log shows them."""
    compiles = sum(result.compiles or 0 for result in results)
    compiling = sum(result.compile_seconds or 0 for result in results)
    bad = [result for result in results if result.verdict != "right"]
    if compiles:
        print(f"{compiles} kernels compiled, {compiling:.0f} s of one core")
    print(f"{len(results) - len(bad)} right, {len(bad)} not, {seconds:.0f} s")
    for result in bad:
        print(result)
    return 1 if bad or not results else 0


def prepare_environment() -> None:
    """Of the processes to come: interpreted where there is no GPU, one thread each, fused as in every mode."""
    from moe_conformance.running.devices import gpu_count

    if not gpu_count():
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
        sys.exit()
    sys.exit(main())
