"""Every check of every suite, and the verdict of one on an engine, goldens included."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import moe_conformance.suites
from moe_conformance.catalogue.case import Case
from moe_conformance.judging.goldens import matches
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Outcome, Verdict, at_level


def modules(package: object, prefix: str) -> Iterator[object]:
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):  # type: ignore[attr-defined]
        if found.name.rpartition(".")[2].startswith(prefix):
            yield importlib.import_module(found.name)


CHECKS: list[tuple[str, str, Case]] = [
    (module.__name__, name, case)
    for module in modules(moe_conformance.suites, "test_")
    for name, function in vars(module).items()
    for case in getattr(function, "moe_cases", ())
]


def verdict(judge: Judge, module: str, name: str, case: Case) -> Verdict:
    outcome = judge.run(module, name, case)
    facts = outcome.facts
    if facts is not None and not matches(case.bug_class, name.removeprefix("test_"), case.id, facts):
        outcome = Outcome(Verdict.FAIL)
    return at_level(outcome, case.level).verdict
