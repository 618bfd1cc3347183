"""Verdicts, the outcome of one check, and the record of one result. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from moe_conformance.catalogue.clauses import Level

# Begins the message of an answer that differs from its golden; a line of the difference each follows.
DIFFERENCE = "the answer differs from the golden (- want, + got):"


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    BROKEN_SHOULD = "broken_should"
    ERROR = "error"
    CRASH = "crash"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    ABSENT = "absent"
    UNAVAILABLE = "unavailable"
    KNOWN_FAILURE = "known_failure"
    UNEXPECTED_PASS = "unexpected_pass"

    @property
    def is_bad(self) -> bool:
        """Whether it makes a run exit 1; a broken SHOULD does with --strict only."""
        fine = (Verdict.PASS, Verdict.UNSUPPORTED, Verdict.ABSENT, Verdict.KNOWN_FAILURE, Verdict.BROKEN_SHOULD)
        return self not in fine

    @property
    def was_judged(self) -> bool:
        """Whether the engine answered, well or badly."""
        return self not in (Verdict.UNSUPPORTED, Verdict.ABSENT, Verdict.UNAVAILABLE)

    @property
    def badness(self) -> int:
        """0 for what is as it should be, 1 for a broken SHOULD, 2 for what makes a run exit 1."""
        return 2 if self.is_bad else int(self is Verdict.BROKEN_SHOULD)


class Refusal(StrEnum):
    """Why a case was not judged: the adapter declares no such stage, feature or size, or it refused this call;
    or the answer is known for the default seed alone."""

    STAGE = "stage"
    FEATURE = "feature"
    LIMIT = "limit"
    CALL = "call"
    SEED = "seed"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check. facts: JSON data for the golden snapshot. refusal: of an unsupported or absent case."""

    verdict: Verdict
    message: str = ""
    facts: Any = None
    refusal: Refusal | None = None


def at_level(outcome: Outcome, level: Level) -> Outcome:
    """The outcome at this level: a broken SHOULD is not a fail. Crashes and hangs are the same at either level."""
    if outcome.verdict is Verdict.FAIL and level == "SHOULD":
        return replace(outcome, verdict=Verdict.BROKEN_SHOULD)
    return outcome


@dataclass(frozen=True)
class Result:
    """One check of one case on one engine."""

    engine: str
    case: str
    check: str
    bug_class: str
    stage: str
    verdict: Verdict
    message: str = ""
    seconds: float = 0.0
    level: Level = "MUST"
    refusal: Refusal | None = None

    def as_line(self) -> dict[str, Any]:
        """The verdict stream's form: `class` for bug_class."""
        line = {"kind": "result", **asdict(self), "seconds": round(self.seconds, 3)}
        line["class"] = line.pop("bug_class")
        return line

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """The result in a line of a verdict stream. Raises ValueError where a key is missing or unknown."""
        values = dict(line)
        if values.keys() != _KEYS:
            absent, strange = sorted(_KEYS - values.keys()), sorted(values.keys() - _KEYS)
            raise ValueError(f"result: got without {absent} and with {strange}, want the keys {sorted(_KEYS)}")
        del values["kind"]
        verdict, refusal = Verdict(values.pop("verdict")), values.pop("refusal")
        return cls(
            bug_class=values.pop("class"), verdict=verdict, refusal=Refusal(refusal) if refusal else None, **values
        )


_KEYS = {"kind", "class", *Result.__dataclass_fields__} - {"bug_class"}
