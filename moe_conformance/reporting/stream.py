"""Reads verdict streams of this release and older ones, and compares two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result, Verdict

Key = tuple[str, str, str]


def read(path: Path) -> list[Result]:
    """The results of a run, from its folder or its verdicts.jsonl, in the names of today.

    Raises UsageError if it is not a verdict stream, or has no footer: then the run died and results are missing.
    """
    file = path / "verdicts.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kinds = [line["kind"] for line in lines]
        protocol = lines[0].get("protocol", 1) if lines else 1
        results = [result_of(line, protocol) for line in lines if line["kind"] == "result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: got {said}, want a verdict stream of `moe-conformance run --out`") from error
    if not kinds or kinds[0] != "header" or kinds[-1] != "footer":
        ends = f"{kinds[0]} to {kinds[-1]}" if kinds else "no lines"
        raise UsageError(f"{file}: got {ends}, want header to footer: the run died before its end; run it again")
    return results


def result_of(line: Mapping[str, Any], protocol: int) -> Result:
    """A line's result in the names of today. Raises ValueError where it is none."""
    # Before protocol 2 there was one level, and a refusal gave no kind.
    since = {"level": "MUST", "refusal": None} if protocol < 2 else {}
    result = Result.from_line({**since, **line})
    case, check = aliases.CASES.get(result.case, result.case), aliases.CHECKS.get(result.check, result.check)
    if (now := catalogue().get(case)) is None:
        bug_class = aliases.CLASSES.get(result.bug_class, result.bug_class)
        return replace(result, case=case, check=check, bug_class=bug_class)
    return replace(result, case=case, check=check, bug_class=now.bug_class, stage=now.stage)


@dataclass(frozen=True)
class Change:
    """One (engine, case, check) whose verdict differs; None where one run lacks it."""

    key: Key
    before: Verdict | None
    after: Verdict | None

    @property
    def is_worse(self) -> bool:
        """Worse is: judged before and not now, or more broken than before; a new case if it fails a run."""
        if self.after is None or not self.after.was_judged:
            return self.before is not None and self.before.was_judged
        return self.after.badness > (1 if self.before is None else self.before.badness)

    def __str__(self) -> str:
        mark = "worse " if self.is_worse else "      "
        return f"{mark} {' '.join(self.key)}: {self.before or 'not run'} -> {self.after or 'not run'}"


def compare(before: Path, after: Path) -> list[Change]:
    """Every change of verdict between two runs, worst first."""
    old, new = (_by_key(read(path)) for path in (before, after))
    keys = sorted(old.keys() | new.keys())
    changes = [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
    return sorted(changes, key=lambda change: not change.is_worse)


def _by_key(results: list[Result]) -> dict[Key, Verdict]:
    """The verdict of each key; the worst one if two old cases are one today."""
    found: dict[Key, Verdict] = {}
    for result in results:
        key = (result.engine, result.case, result.check)
        found[key] = max(found.get(key, result.verdict), result.verdict, key=lambda verdict: verdict.badness)
    return found
