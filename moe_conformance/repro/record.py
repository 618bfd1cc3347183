"""`python -m moe_conformance.repro.record NAME PATH CASE SEED FILE ENVIRONMENT EARLIER`, in the engine's process.

Before each call of the stage a script of it is written to FILE, so that the last one is there if the call ends the
process. Exit code 0: FILE shows a wrong answer. 3: no call by itself got one; what is said instead is printed.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.catalogue.clauses import CLAUSES
from moe_conformance.engine import Repro, ShardInputs
from moe_conformance.errors import InputError, MoEConformanceError, Undecided, Unsupported
from moe_conformance.judging.judge import Judge
from moe_conformance.repro import STAGES
from moe_conformance.repro.script import About, script
from moe_conformance.repro.wanted import Wanted, calls_of_an_answer, is_legal
from moe_conformance.running.discovery import Target, extend_path

NOT_SHOWN = 3


class Found(BaseException):
    """The file shows the fault. No check catches it."""


class Recording:
    """The adapter, with an eye on each call of one stage. earlier: scripts make the calls that went before, too."""

    def __init__(self, raw: Any, about: About, file: Path, earlier: bool, made: list[tuple[str, Tensor]]) -> None:
        self._raw, self._about, self._file, self._with_earlier, self._made = raw, about, file, earlier, made
        self._history: list[Any] = []
        self._group: list[tuple[Any, Any]] = []
        self.why = ""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._raw, name)
        return self._call if name == self._about.stage else found

    def _call(self, inputs: Any) -> Any:
        method = getattr(self._raw, self._about.stage)
        if type(getattr(inputs, "x", None) if hasattr(inputs, "x") else None) not in (type(None), Tensor):
            return method(inputs)  # fake tensors have no numbers
        if not self._joins(inputs):
            self._group = []
        calls = [*(call for call, _ in self._group), inputs]
        try:
            wanted = Wanted(calls)
        except (Undecided, Unsupported, InputError) as error:
            self.why = str(error)
            return method(inputs)
        self._write(wanted, calls, ())
        try:
            answer = method(inputs)
        except Unsupported:
            raise
        except Exception as error:
            if is_legal(inputs):
                raise Found from error
            raise
        self._group.append((inputs, answer))
        if len(self._group) == calls_of_an_answer(inputs):
            answers = [each for _, each in self._group]
            self._group = []
            if wanted.is_wrong(answers):
                self._write(wanted, calls, answers)
                raise Found
        self._history.append(inputs)
        return answer

    def _joins(self, inputs: Any) -> bool:
        """Whether it is one more part of the same sum."""
        return isinstance(inputs, ShardInputs) and bool(self._group) and self._group[0][0].whole is inputs.whole

    def _write(self, wanted: Wanted, calls: Sequence[Any], answers: Sequence[Any]) -> None:
        earlier = self._history if self._with_earlier else []
        shown = None if earlier or len(calls) > 1 else _shown(self._raw, calls[0])
        if shown is not None and answers and not _agrees(shown, answers[0]):
            shown = None  # something of the call is the adapter's
        text = script(self._about, earlier, calls, shown, wanted.shown(answers), self._made)
        self._file.write_text(text, encoding="utf-8")


def _shown(raw: Any, inputs: Any) -> Repro | None:
    try:
        found: Repro | None = raw.repro(inputs) if hasattr(raw, "repro") else None
        return found
    except Unsupported:
        return None


def _agrees(shown: Repro, answer: Any) -> bool:
    """Whether the engine's own call gives what the stage gave."""
    found: dict[str, Any] = {"torch": torch, "t": dict(shown.tensors)}
    try:
        exec(compile(shown.source, "<repro>", "exec"), found)
        got = [part.cpu() for part in (found["got"] if isinstance(answer, tuple) else [found["got"]])]
        want = [part.cpu() for part in (answer if isinstance(answer, tuple) else [answer])]
        return all(
            a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True)
        )
    except Exception:
        return False


def record(target: Target, case: Case, seed: int, file: Path, environment: dict[str, str], earlier: bool) -> str:
    """ "" where the file shows the fault, or why it does not."""
    if case.stage not in STAGES:
        return f"{case.id} is of the stage {case.stage}, want one of {', '.join(STAGES)}"
    judge = Judge(target, seed)
    judge.made = []
    about = About(judge.engine.info, target.path, case.stage, case.id, CLAUSES[case.clause].text, environment)
    recording = Recording(judge.engine.raw, about, file, earlier, judge.made)
    judge.engine.raw = recording
    told = []
    for module, name in _checks_of(case):
        recording.why = ""
        try:
            outcome = judge.run(module, name, case)
        except Found:
            return ""
        told.append(f"{name}: {outcome.verdict}: {outcome.message or recording.why}".rstrip(": "))
    return "no single call got an answer that is wrong by itself:\n" + "\n".join(told)


def _checks_of(case: Case) -> list[tuple[str, str]]:
    """Module and function of each check of the case."""
    folder = importlib.import_module(f"moe_conformance.suites.{case.stage}")
    found = []
    for item in pkgutil.iter_modules(folder.__path__, folder.__name__ + "."):
        if item.name.rpartition(".")[2].startswith("test_"):
            functions = vars(importlib.import_module(item.name))
            found += [(item.name, n) for n, f in functions.items() if case in getattr(f, "moe_cases", ())]
    return found


def main() -> None:
    name, path, case, seed, file, environment, earlier = sys.argv[1:]
    extend_path()
    try:
        why = record(
            Target(name, path), catalogue()[case], int(seed), Path(file), json.loads(environment), bool(int(earlier))
        )
    except MoEConformanceError as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        print(why)
        sys.exit(NOT_SHOWN)


if __name__ == "__main__":
    main()
