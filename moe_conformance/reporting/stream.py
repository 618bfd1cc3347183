"""Reading verdict streams back, and comparing two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result, Verdict

Key = tuple[str, str, str]


def read(path: Path) -> list[Result]:
    """The results of a run, from its folder or its verdicts.jsonl.

    Raises UsageError if it is not a verdict stream, or has no footer: then the run died and results are missing.
    """
    file = path / "verdicts.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kinds = [line["kind"] for line in lines]
        results = [Result.from_line(line) for line in lines if line["kind"] == "result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: want a verdict stream of `moe-conformance run --out`: {error}") from error
    if not kinds or kinds[0] != "header" or kinds[-1] != "footer":
        raise UsageError(f"{file}: no header or no footer: the run died before its end; run it again")
    return results


@dataclass(frozen=True)
class Change:
    """One (engine, case, check) whose verdict differs; None where one run lacks it."""

    key: Key
    before: Verdict | None
    after: Verdict | None

    @property
    def is_worse(self) -> bool:
        """Bad now and not before, or judged before and not now."""
        if self.after is None or not self.after.was_judged:
            return self.before is not None and self.before.was_judged
        return self.after.is_bad and (self.before is None or not self.before.is_bad)

    def __str__(self) -> str:
        mark = "worse " if self.is_worse else "      "
        return f"{mark} {' '.join(self.key)}: {self.before or 'absent'} -> {self.after or 'absent'}"


def compare(before: Path, after: Path) -> list[Change]:
    """Every change of verdict between two runs, worst first."""
    old, new = ({(r.engine, r.case, r.check): r.verdict for r in read(path)} for path in (before, after))
    keys = sorted(old.keys() | new.keys())
    changes = [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
    return sorted(changes, key=lambda change: not change.is_worse)
