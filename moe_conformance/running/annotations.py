"""Distinct failures as annotations of GitHub Actions: lines that a runner reads from a step's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.faults import Fault, faults

# What GitHub shows of a step, of each kind.
SHOWN = 10
# Characters of a message: an annotation is read beside the code, and the report has all of it.
_LONGEST = 2000


def annotated(results: Iterable[Result]) -> Iterator[str]:
    """A line for each distinct failure: an error, or a warning for a broken SHOULD; many end in a count."""
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
    """One line, whatever is in it: a newline of an engine's must not begin a command of its own."""
    cut = message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."
    title = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={title}::{_escaped(cut)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
