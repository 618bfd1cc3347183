"""Verdict streams as `moe-conformance run --out` leaves them, for what reads them back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_conformance import __version__
from moe_conformance.catalogue.case import catalogue
from moe_conformance.judging.verdict import Refusal, Result, Verdict
from moe_conformance.protocol.stages import PROTOCOL_VERSION
from moe_conformance.reporting.explain import failure


def result(
    case: str, verdict: Verdict, message: str = "", engine: str = "mine", check: str = "output_is_right"
) -> Result:
    """As a session makes it, of a case that exists."""
    known = catalogue()[case]
    made = Result(engine, case, check, known.bug_class, known.stage, verdict, message, 0.25, known.level)
    if verdict.badness:
        return replace(made, message=failure(engine, known, check, message))
    return replace(made, refusal=Refusal.STAGE if verdict is Verdict.UNSUPPORTED else None)


def lines(results: Iterable[Result], versions: Mapping[str, str], **header: Any) -> list[str]:
    """header, engines, results, footer."""
    found = list(results)
    head = {"kind": "header", "suite": __version__, "protocol": PROTOCOL_VERSION, "python": "3.11.7", **header}
    engines = [
        {"kind": "engine", "engine": name, "version": version, "device": "cpu"} for name, version in versions.items()
    ]
    foot = {"kind": "footer", "exit": 0, "results": len(found), "counts": {}}
    return [json.dumps(line) for line in (head, *engines, *(each.as_line() for each in found), foot)]


def write(folder: Path, text: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "verdicts.jsonl").write_text("".join(f"{line}\n" for line in text))
    return folder


def many(folder: Path, count: int) -> list[Path]:
    """So many results of two engines in five versions, of every verdict, with messages that all differ."""
    cases, verdicts = list(catalogue()), list(Verdict)
    folders = []
    for version in range(5):
        results = []
        for number in range(count // 5):
            verdict = verdicts[(number * 7 + version) % len(verdicts)] if number % 3 else Verdict.PASS
            numbers = " ".join(f"{(number * 2654435761 + place * 40503) % 10**9}" for place in range(12))
            said = f"ids[{number}, {version}]: got {numbers}, want {'abcdefgh'[number % 8]} within 1e-{number % 9}"
            engine = ("one", "two")[number % 2]
            results.append(result(cases[number % len(cases)], verdict, said, engine, f"check_{number % 11}"))
        versions = {"one": f"0.{version}.0", "two": f"2.{version}"}
        folders.append(write(folder / f"run-{version}", lines(results, versions, started=f"2026-01-0{version + 1}")))
    return folders
