"""Throws hostile configs, checkpoints and records at their readers: `python tools/fuzz.py --seconds 60 --seed 1`.

Each call must give a result or an error of this project's own, in two seconds and two GiB. What does not is printed,
once for each kind, with the fewest edits that still show it, is kept with --keep, and makes the exit code 1. Inputs are
tried in a separate process, which is replaced if it does not come back. An input depends only on the seed and its
number: --only N tries that one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from hostile_inputs import SECONDS, Found, Hostile, generated, judged, little_memory, tries  # noqa: E402

CORPUS = ROOT / "tests" / "hostile"
# The mix that users meet: more configs than folders; few stored weights and records, whose calls are quick and alike.
KINDS = ("config",) * 5 + ("checkpoint",) * 4 + ("stored", "record")
PATIENCE = 3 * SECONDS  # for a call that does not heed its time limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="stop after so long (default 60)")
    parser.add_argument("--inputs", type=int, help="stop after so many inputs instead")
    parser.add_argument("--seed", type=int, help="default: one that is new each time")
    parser.add_argument("--kind", choices=sorted(set(KINDS)), help="inputs of this kind alone")
    parser.add_argument("--only", type=int, metavar="N", help="try input number N alone, and print it")
    parser.add_argument(
        "--keep", type=Path, nargs="?", const=CORPUS, help=f"where to keep what is found ({CORPUS.name}/)"
    )
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    kinds = (options.kind,) if options.kind else KINDS
    if options.only is not None:
        print(made(seed, options.only, kinds).text())
    numbers = range(options.only, options.only + 1) if options.only is not None else range(options.inputs or 2**60)
    # What a process that was ended leaves behind goes with the folder.
    with tempfile.TemporaryDirectory() as folder:
        found = run(Worker(folder), seed, kinds, numbers, 0 if options.inputs else options.seconds, options.keep)
    sys.exit(found)


def made(seed: int, number: int, kinds: tuple[str, ...]) -> Hostile:
    rng = random.Random(f"{seed} {number}")
    return generated(rng.choice(kinds), rng)


def run(worker: Worker, seed: int, kinds: tuple[str, ...], numbers: range, seconds: float, keep: Path | None) -> bool:
    """Prints figures and findings; whether there are any."""
    began = time.monotonic()
    calls: Counter[str] = Counter()
    verdicts: Counter[tuple[str, str]] = Counter()
    found: set[tuple[str, ...]] = set()
    inputs: Counter[str] = Counter()
    for number in numbers:
        if seconds and time.monotonic() - began > seconds:
            break
        hostile = made(seed, number, kinds)
        inputs[hostile.kind] += 1
        for call, verdict, finding in worker.ask(hostile):
            calls[f"{hostile.kind}/{call}"] += 1
            verdicts[f"{hostile.kind}/{call}", verdict] += 1
            if finding is not None and finding.signature not in found and again(worker, hostile, finding):
                found.add(finding.signature)
                report(number, fewer(worker, hostile, finding), finding, keep)
    worker.end()
    print(f"\n{'call':24} {'calls':>7}  verdicts")
    for call, count in sorted(calls.items()):
        said = ", ".join(f"{verdict} {n}" for (name, verdict), n in sorted(verdicts.items()) if name == call)
        print(f"{call:24} {count:7}  {said}")
    print(
        f"{sum(inputs.values())} inputs ({', '.join(f'{n} {kind}' for kind, n in sorted(inputs.items()))}), "
        f"{len(found)} kinds of findings, {time.monotonic() - began:.0f} s"
    )
    return bool(found)


def report(number: int, hostile: Hostile, finding: Found, keep: Path | None) -> None:
    print(f"\n{finding.what} in {finding.call} at {finding.place}: {finding.trouble}")
    print(f"  input {number}, at its least: {hostile.text()}", flush=True)
    if keep is not None:
        keep.mkdir(exist_ok=True)
        words = f"{finding.what} {finding.call} {finding.trouble.partition(':')[0]} {finding.place}"
        content = {"why": f"{finding.what} in {finding.call}: {finding.trouble}"} | json.loads(hostile.text())
        file = keep / f"{'-'.join(re.findall('[a-z0-9_]+', words.replace('.py', '').lower()))}.json"
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def again(worker: Worker, hostile: Hostile, finding: Found) -> bool:
    """Whether the finding shows again: a single slow call may be due to the machine."""
    found = (other for _, _, other in worker.ask(hostile))
    return any(other is not None and other.signature == finding.signature for other in found)


def fewer(worker: Worker, hostile: Hostile, finding: Found) -> Hostile:
    """The input without the edits that the finding does not need."""
    for edit in list(hostile.edits):
        less = Hostile(hostile.kind, hostile.base, [other for other in hostile.edits if other is not edit])
        if again(worker, less, finding):
            hostile = less
    return hostile


Answer = tuple[str, str, Found | None]


class Worker:
    """A process that tries inputs in `folder`; a new one where the last has died or does not answer."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("fork")
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, hostile: Hostile) -> list[Answer]:
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=work, args=(theirs, self._folder), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send(hostile)
        answers: list[Answer] = []
        call = "setup"  # if that fails, hostile_inputs.py is at fault
        while True:
            try:
                told = self._pipe.recv() if self._pipe.poll(PATIENCE + 10 * (call == "setup")) else None
            except EOFError:
                told = None
            if told is None:
                died = not self._process.is_alive() or self._process.exitcode is not None
                self.end()
                code = self._process_code
                what = Found(
                    call, "died" if died else "hang", f"exit code {code}" if died else "does not come back", ""
                )
                return [*answers, (call, what.what, what)]
            if told == "done":
                return answers
            if isinstance(told, str):
                call = told
            else:
                answers.append(told)

    def end(self) -> None:
        if self._process is not None:
            self._process.join(0.5)
            self._process_code = self._process.exitcode
            self._process.kill()
            self._process.join()
            self._process = None


def work(pipe: Connection, folder: str) -> None:
    tempfile.tempdir = folder
    with little_memory():
        while True:
            try:
                hostile = pipe.recv()
            except EOFError:
                return
            with tries(hostile) as calls:
                for name, call in calls:
                    pipe.send(name)
                    verdict, finding = judged(name, call)
                    pipe.send((name, verdict, finding))
            pipe.send("done")


if __name__ == "__main__":
    main()
