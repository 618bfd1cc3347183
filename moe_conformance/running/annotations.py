"""Distinct failures as annotations of GitHub Actions: lines that a runner reads from a step's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.faults import Fault, faults

# How many annotations of each kind GitHub shows for a step.
SHOWN = 10
# Characters of a message: an annotation is read beside the code, the report has the whole message.
_LONGEST = 2000


def annotated(results: Iterable[Result]) -> Iterator[str]:
    """A line for each distinct failure: error, or warning for a broken SHOULD; the rest is counted."""
    columns: dict[str, list[Result]] = {}
    for result in results:
        columns.setdefault(result.engine, []).append(result)
    kinds: dict[str, list[Fault]] = {"error": [], "warning": []}
    for fault in faults(columns):
        kinds["warning" if fault.verdict is Verdict.BROKEN_SHOULD else "error"].append(fault)
    for kind, failures in kinds.items():
        shown = failures if len(failures) <= SHOWN else failures[: SHOWN - 1]
        for fault in shown:
            first, more = fault.first, len(fault.hits) - 1
            title = f"{first.verdict}: {', '.join(fault.columns)}: {first.check.replace('_', ' ')}"
            yield command(
                kind, title, f"{first.case}" + (f" and {more} more results" if more else "") + f"\n{first.message}"
            )
        if left := failures[len(shown) :]:
            yield command(kind, "moe-conformance", f"and {len(left)} more distinct failures; see the job's summary")


def command(kind: str, title: str, message: str) -> str:
    """Always one line: a newline in an engine's text must not start another command."""
    cut = message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."
    title = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={title}::{_escaped(cut)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
