"""Everything that needs a GPU, most valuable first, within a budget; a second call continues.

    ci/gpu.sh --budget 480 --out results/gpu        # finds an interpreter, installs what is missing, and calls this
    python tools/gpu_job.py --rehearse --out results/rehearsal      # the same steps without a GPU, interpreted, smaller

The steps are those of tools/gpu_steps.py. Each is a process group with a time limit, at which it is killed. With
--budget, a step gets a share of the remaining time by its weight, including what earlier steps did not use. A call with
the same --out does not repeat steps that are done. A step that was cut short is run again in its place; one that was
killed at its limit is run again after those that have not begun.

OUT has state.json, summary.md, log.txt (the output of all steps, bounded), results.zip (their files, a folder a step)
and cache.zip (what Triton compiled, for the next call); OUT/now has what the running step has written so far.

exit code 0: every step is done, and none has failed.
          1: a step failed or was killed at its limit.
          2: wrong usage.
          3: no step failed, but some were not reached, or need what is not here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH, which ci/gpu.sh sets, leaves it out

from compile_cache import kernels, pack, unpack
from gpu_estimate import estimate
from gpu_steps import DEVICE, INTERPRETED, PLANNED, STEPS, Step, limit_of
from step_process import Ended, Log, end_marked, run

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1
# No file of the results is larger.
LARGEST = 16 * 2**20
# Seconds of the budget that packing the compile cache and writing the summary take.
WRITING = 4.0
# Of one step's own summary, in that of the job.
EXCERPT = 32 * 1024
DONE, CUT_SHORT = ("ok", "failed"), ("killed", "interrupted")


class Refused(ValueError):
    """Wrong usage, in words."""


class Stopped(Exception):
    """By a signal, whose number it has."""


@dataclass(frozen=True)
class Record:
    """The result of a step. outcome: ok, failed, killed, interrupted, or unable. sources, device: what it ran on.

    compiled: kernels that it added to the compile cache. core_seconds: that its processes computed, all together.
    """

    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    note: str = ""
    tail: str = ""
    sources: str = ""
    device: str = ""
    compiled: int = 0
    core_seconds: float = 0.0


@dataclass
class State:
    """All that a later call must know. running: the current step, and its processes' mark. calls: when, and how."""

    mode: str
    steps: dict[str, Record] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    version: int = VERSION

    def save(self, path: Path) -> None:
        """Atomically: a call that is killed here leaves either the old state or this one."""
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def load(path: Path, mode: str) -> State:
    if not path.exists():
        return State(mode)
    state = read_state(path)
    if state.mode != mode:
        raise Refused(f"{path}: got results of a {state.mode}, want of a {mode}; choose another --out")
    return state


def read_state(path: Path) -> State:
    """Raises Refused for a file that is not a state of this version, OSError where there is none."""
    what = f"{path}: got %s, want one that this version wrote; choose another --out, or remove that folder"
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(what % f"no JSON ({error})") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        got = f"version {found.get('version')!r}" if isinstance(found, dict) else type(found).__name__
        raise Refused(what % f"a state file of {got} and not {VERSION}")
    try:
        steps = {name: Record(**record) for name, record in found.pop("steps").items()}
        return State(**found, steps=steps)
    except (TypeError, KeyError, AttributeError) as error:
        raise Refused(what % f"other fields ({error})") from error


def write_whole(path: Path, data: bytes) -> None:
    half = path.with_name(f".{path.name}.half")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


class Job:
    def __init__(self, out: Path, steps: Sequence[Step], budget: float, rehearse: bool, call: str = "") -> None:
        self.out, self.steps, self.budget, self.rehearse, self.call = out, steps, budget, rehearse, call
        self.began = time.monotonic()
        self.state = load(out / "state.json", "rehearsal" if rehearse else "GPU job")
        self.sources = digest_of_sources()
        # What this call did not reach, and why.
        self.unreached: dict[str, str] = {}
        # Where Triton keeps what it compiled, and what is to be said of it.
        self.cache, self.caching = Path(), ""

    @property
    def left(self) -> float:
        return self.budget - WRITING - (time.monotonic() - self.began)

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="compile-cache-") as folder:
            self.cache = Path(folder)
            return self.run_steps()

    def run_steps(self) -> int:
        self.clean()
        self.state.calls.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: `{self.call}`")
        print(started := unpack(self.out / "cache.zip", self.cache), flush=True)
        code = 0
        try:
            for position, step in (todo := list(enumerate(self.order()))):
                limit = limit_of(step, [other for _, other in todo[position:]], self.left)
                if limit is None:
                    self.unreached[step.name] = f"{max(0.0, self.left):.0f} s were left, it wants {step.least:g}"
                elif reason := self.lacking(step):
                    self.keep(step, Record("unable", note=reason))
                else:
                    self.run_step(step, limit)
        except Stopped as stop:
            code = 128 + int(str(stop))
            for step in self.order():
                if step.name not in self.state.steps:
                    self.unreached[step.name] = f"the job was ended by {signal.Signals(int(str(stop))).name}"
        self.caching = "; ".join(
            words for words in (started, pack(self.cache, self.out / "cache.zip", LARGEST)) if words
        )
        write_whole(self.out / "summary.md", self.summary().encode())
        print(self.brief(), flush=True)
        return code or self.code()

    def clean(self) -> None:
        """Remove what a killed call left: the processes of its step, and their partial results."""
        if self.state.running:
            step, mark = self.state.running["step"], self.state.running["mark"]
            killed = end_marked(mark)
            print(f"{step}: the last call was killed while it ran; {killed} processes of it were still there")
            note = "the job was killed while it ran"
            self.state.steps[step] = Record("interrupted", note=note)
            self.state.running = {}
        self.state.save(self.out / "state.json")
        shutil.rmtree(self.out / "now", ignore_errors=True)

    def order(self) -> list[Step]:
        """Steps to run: first those that have no result, last those that have already used up their limit."""
        records = self.state.steps

        def outcome(step: Step) -> str:
            return records[step.name].outcome if step.name in records and step.name != DEVICE else ""

        return sorted((s for s in self.steps if outcome(s) not in DONE), key=lambda step: outcome(step) == "killed")

    def lacking(self, step: Step) -> str:
        """Why it cannot run here; empty if it can."""
        if self.rehearse and not step.rehearsal:
            return "no rehearsal: it needs a GPU"
        facts, known = self.state.facts, ("gpu", "triton", "transformers", "idle")
        for need in step.needs:
            if self.rehearse and need in ("gpu", "idle"):
                continue
            if need in facts.get("lacks", {}):
                return str(facts["lacks"][need])
            if need not in known and shutil.which(need) is None:
                return f"{need} is not on the PATH"
        if not self.rehearse and step.memory and (free := facts.get("free", 0) / 2**30) < step.memory:
            return f"too little memory: {free:.1f} GiB are free on the GPU, it wants {step.memory:g}"
        return ""

    def run_step(self, step: Step, limit: float) -> None:
        now, mark = self.out / "now", uuid.uuid4().hex
        shutil.rmtree(now, ignore_errors=True)
        now.mkdir()
        self.state.running = {"step": step.name, "mark": mark}
        self.state.save(self.out / "state.json")
        place_tuned(self.out / "results.zip")
        print(f"{step.name}: at most {limit:g} s", flush=True)
        log = Log(self.out / "log.txt", f"{step.name}, at most {limit:g} s")
        began, before, computed = time.monotonic(), kernels(self.cache), core_seconds()
        try:
            ended = run(self.command(step, limit, now), self.environment(step), limit, log, mark, ROOT)
            record = outcome_of(ended, limit)
        except OSError as error:
            record = Record("failed", note=f"not started: {error}")
        except Stopped:
            spent = time.monotonic() - began
            self.finish(step, Record("interrupted", spent, limit, "the job was ended while it ran"), now)
            raise
        spent = round(core_seconds() - computed, 1)
        self.finish(step, replace(record, compiled=kernels(self.cache) - before, core_seconds=spent), now)

    def finish(self, step: Step, record: Record, now: Path) -> None:
        """Files first, then the state that refers to them."""
        if step.name == DEVICE:
            self.state.facts = facts_of(now / "facts.json", record)
        left_out = add_results(self.out / "results.zip", step.name, now)
        shutil.rmtree(now, ignore_errors=True)
        note = "; ".join(part for part in (record.note, left_out) if part)
        self.keep(step, replace(record, seconds=round(record.seconds, 1), note=note))

    def keep(self, step: Step, record: Record) -> None:
        device = self.state.facts.get("name", "")
        self.state.steps[step.name] = replace(record, sources=self.sources, device=device)
        self.state.running = {}
        self.state.save(self.out / "state.json")
        print(f"{step.name}: {told(record)}", flush=True)

    def command(self, step: Step, limit: float, now: Path) -> list[str]:
        cores = os.cpu_count() or 1
        filled = {
            "python": sys.executable,
            "out": str(now),
            "seconds": f"{PLANNED * limit:.0f}",
            "jobs": str(cores),
            # A worker waits while its engine computes: a core is enough for both. Each has a context on the GPU.
            "workers": str(min(16, cores)),
        }
        words = step.rehearsal if self.rehearse else step.command
        return [word.format_map(filled) for word in words]

    def environment(self, step: Step) -> dict[str, str]:
        # PYTHONSAFEPATH: the checkout's `kernels` must not shadow Hugging Face's.
        common = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        common["TRITON_CACHE_DIR"] = str(self.cache)
        return {**os.environ, **common, **(INTERPRETED if self.rehearse else {}), **step.environment}

    def named(self, *outcomes: str) -> list[str]:
        records = self.state.steps
        return [step.name for step in self.steps if step.name in records and records[step.name].outcome in outcomes]

    def code(self) -> int:
        if self.named("failed", *CUT_SHORT):
            return 1
        done = self.named("ok")
        wanted = [step.name for step in self.steps if not self.rehearse or step.rehearsal]
        return 0 if set(wanted) <= set(done) else 3

    def brief(self) -> str:
        """What the exit code stands for, a line each."""
        unable = [name for name in self.named("unable") if name not in self.unreached]
        lists = {
            "Failed": ", ".join(self.named("failed")),
            "Killed at its limit": ", ".join(self.named("killed")),
            "Cut short": ", ".join(self.named("interrupted")),
            "Not reached": by_reason(self.unreached),
            "Could not run": by_reason({name: self.state.steps[name].note for name in unable}),
        }
        lines = [f"{word}: {names}" for word, names in lists.items() if names]
        return "\n".join(lines) or "Every step is done, and none has failed."

    def summary(self) -> str:
        facts, spent = self.state.facts, time.monotonic() - self.began
        given = "no budget" if self.budget == math.inf else f"a budget of {self.budget:g} s"
        versions = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items() if number)
        lines = [
            f"# {self.state.mode[0].upper()}{self.state.mode[1:]}",
            "",
            f"{facts.get('name', 'device unknown')}; {versions}",
            f"The last call: {given}, {spent:.0f} s taken.  ",
            self.caching,
            "",
            self.brief().replace("\n", "  \n"),
            "",
            "| step | outcome | s | limit, s | core s | kernels compiled | what |",
            "|---|---|---|---|---|---|---|",
        ]
        for step in self.steps:
            record = self.state.steps.get(step.name, Record("not reached"))
            notes = [self.unreached.get(step.name, record.note)]
            if record.sources not in ("", self.sources):
                notes.append("of other sources than the last call's")
            if record.device not in ("", facts.get("name", "")):
                notes.append(f"on {record.device}")
            what = "; ".join(note for note in notes if note)
            numbers = (record.seconds, record.limit, record.core_seconds, record.compiled)
            lines.append(f"| {' | '.join((step.name, record.outcome, *(f'{number:g}' for number in numbers), what))} |")
        if self.rehearse:
            rehearsed = {name: self.state.steps[name].core_seconds for name in self.named("ok", "failed")}
            lines += ["", *estimate(self.steps, rehearsed)]
        for name in self.named("failed", *CUT_SHORT):
            record = self.state.steps[name]
            lines += ["", f"## {name}: {told(record)}", "", "```", record.tail.replace("```", "'''"), "```"]
        for title, text in self.excerpts():
            lines += ["", f"## {title}", "", text]
        return "\n".join(lines) + "\n"

    def excerpts(self) -> Iterator[tuple[str, str]]:
        """The steps' own summaries."""
        with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(self.out / "results.zip") as results:
            for name in results.namelist():
                if name.endswith(".md"):
                    yield name, results.read(name)[:EXCERPT].decode(errors="replace").strip()


def core_seconds() -> float:
    """Of all processes that this one has waited for, and that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_reason(reasons: Mapping[str, str]) -> str:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in found.items())


def told(record: Record) -> str:
    how = f"{record.outcome}, {record.seconds:.1f} s" if record.seconds else record.outcome
    return f"{how}; {record.note}" if record.note else how


def outcome_of(ended: Ended, limit: float) -> Record:
    if ended.code is None:
        return Record("killed", ended.seconds, limit, f"at its limit of {limit:g} s", ended.tail)
    if ended.code == 0:
        return Record("ok", ended.seconds, limit)
    how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
    return Record("failed", ended.seconds, limit, how, ended.tail)


def facts_of(path: Path, record: Record) -> dict[str, Any]:
    """What the first step found; without it, that nothing is known of the GPU."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    if not isinstance(found, dict) or not isinstance(found.get("lacks"), dict):
        return {"lacks": {"gpu": f"the first step has not said what the GPU is ({told(record)})"}}
    return found


def add_results(path: Path, step: str, folder: Path) -> str:
    """Put the step's files in the archive, replacing those of an earlier try. Returns what had no room, in words."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    left_out = []
    while True:
        half = path.with_name(f".{path.name}.half")
        with zipfile.ZipFile(half, "w", zipfile.ZIP_DEFLATED) as results:
            with contextlib.suppress(FileNotFoundError, zipfile.BadZipFile), zipfile.ZipFile(path) as before:
                for name in before.namelist():
                    if not name.startswith(f"{step}/"):
                        results.writestr(name, before.read(name))
            for file in files:
                results.write(file, f"{step}/{file.relative_to(folder)}")
        if half.stat().st_size <= LARGEST or not files:
            break
        left_out.append(files.pop().name)
    half.replace(path)
    return f"left out, for results.zip would be too large: {', '.join(left_out)}" if left_out else ""


def place_tuned(results: Path) -> None:
    """Put tiles that a step measured where the installed kernels look; a checkout's own files are left alone."""
    spec = importlib.util.find_spec("moe_conformance")
    if spec is None or spec.origin is None or not results.exists():
        return
    kernels = Path(spec.origin).parent / "kernels"
    with zipfile.ZipFile(results) as archive:
        for name in archive.namelist():
            if kernels.is_dir() and Path(name).parent.name == "tuned" and name.endswith(".json"):
                (kernels / "tuned").mkdir(exist_ok=True)
                (kernels / "tuned" / Path(name).name).write_bytes(archive.read(name))


def refuse_other_sources() -> None:
    """Raises Refused if the installed package is not this checkout: results would be reported as the checkout's."""
    for folder in ("kernels", "reference_impl", "engines", "suites"):
        spec = importlib.util.find_spec(f"moe_conformance.{folder}")
        installed = Path(spec.origin).parent if spec and spec.origin else Path()
        for path in sorted((ROOT / folder).rglob("*.py")):
            other = installed / path.relative_to(ROOT / folder)
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                got = f"got another {path.relative_to(ROOT)} in {installed.parent}, want this checkout's"
                raise Refused(f"moe_conformance: {got}; install it again (wheels: python tools/wheels.py)")


def digest_of_sources() -> str:
    """Distinguishes results of different states of the code."""
    folders = ("kernels", "reference_impl", "engines", "suites", "moe_conformance", "benchmarks", "tools", "tests")
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def opened(out: Path) -> int:
    """The results folder, made and locked for as long as this process lives."""
    if out.exists() and not out.is_dir():
        raise Refused(f"--out: got {out}, which is a file; want a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise Refused(f"--out: got {out}, want a folder that can be written ({error})") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Refused(f"--out: another job is at work in {out}; wait for it, or choose another folder") from error
    return folder


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, want seconds above 0")
    return number


def stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # only once: what follows is cleaning up
    raise Stopped(str(number))


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=seconds, default=math.inf, metavar="SECONDS", help="for this call")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER", help="default: results/gpu")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: interpreted, smaller shapes")
    options = parser.parse_args(arguments)
    try:
        refuse_other_sources()
        folder = opened(options.out)
        call = shlex.join(["ci/gpu.sh", *(sys.argv[1:] if arguments is None else arguments)])
        job = Job(options.out.resolve(), steps, options.budget, options.rehearse, call)
    except Refused as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        return job.run()
    finally:
        os.close(folder)


if __name__ == "__main__":
    sys.exit(main())
