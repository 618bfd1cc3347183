"""Verdicts, and the record of one result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    CRASH = "crash"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    KNOWN_FAILURE = "known_failure"
    UNEXPECTED_PASS = "unexpected_pass"

    @property
    def is_bad(self) -> bool:
        """Whether it makes a run exit 1."""
        return self not in (Verdict.PASS, Verdict.UNSUPPORTED, Verdict.KNOWN_FAILURE)

    @property
    def was_judged(self) -> bool:
        """Whether the engine answered, well or badly."""
        return self not in (Verdict.UNSUPPORTED, Verdict.UNAVAILABLE)


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

    def as_line(self) -> dict[str, Any]:
        """The verdict stream's form: `class` for bug_class."""
        line = {"kind": "result", **asdict(self), "seconds": round(self.seconds, 3)}
        line["class"] = line.pop("bug_class")
        return line

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        fields = {key: line[key] for key in ("engine", "case", "check", "stage", "message", "seconds")}
        return cls(bug_class=line["class"], verdict=Verdict(line["verdict"]), **fields)
