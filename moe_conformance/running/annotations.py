"""Distinct failures as annotations of GitHub Actions: lines that a runner reads from a step's output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from moe_conformance.judging.verdict import Result, Verdict

# What GitHub shows of a step, of each kind.
SHOWN = 10
# Characters of a message: an annotation is read beside the code, and the report has all of it.
_LONGEST = 2000
# Numbers, which differ from case to case of one fault.
_NUMBER = re.compile(r"[-+]?\b\d+(\.\d+)?(e[-+]?\d+)?\b|\bnan\b|\binf\b")


def distinct(results: Iterable[Result]) -> list[list[Result]]:
    """Results that a run is worse for, those of one engine, check and reason together; the most frequent first.

    The reason is the first line behind the check's name, whatever numbers are in it.
    """
    found: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.verdict.badness:
            found.setdefault((result.engine, result.check, result.verdict, _reason(result)), []).append(result)
    return sorted(found.values(), key=lambda alike: (-alike[0].verdict.badness, -len(alike)))


def _reason(result: Result) -> str:
    first = result.message.removeprefix(f"{result.check.replace('_', ' ')}\n").partition("\n")[0]
    return _NUMBER.sub("#", first)


def annotated(results: Iterable[Result]) -> Iterator[str]:
    """A line for each distinct failure: an error, or a warning for a broken SHOULD; many end in a count."""
    kinds: dict[str, list[list[Result]]] = {"error": [], "warning": []}
    for alike in distinct(results):
        kinds["warning" if alike[0].verdict is Verdict.BROKEN_SHOULD else "error"].append(alike)
    for kind, failures in kinds.items():
        shown = failures if len(failures) <= SHOWN else failures[: SHOWN - 1]
        for alike in shown:
            first, more = alike[0], len(alike) - 1
            title = f"{first.verdict}: {first.engine}: {first.check.replace('_', ' ')}"
            yield command(
                kind, title, f"{first.case}" + (f" and {more} more cases" if more else "") + f"\n{first.message}"
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
