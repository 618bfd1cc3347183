"""Distinct faults: failures of one check whose messages are equal up to numbers, names and lists, told once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe_conformance.catalogue.case import catalogue
from moe_conformance.judging.verdict import DIFFERENCE, Result, Verdict
from moe_conformance.reporting.explain import rerun
from moe_conformance.reporting.tables import Columns, cut

# Of a stage whose adapter is not what it declares: see Judge.probe.
_PROBED = "the adapter failed the probe of "
# Marks the end of the part of a message that is about this result alone: see failure() in reporting/explain.py.
_ABOUT = "\nstage:    "
# A quoted name is one word to a shell, whatever it contains.
_RERUN = re.compile(
    r"\nrerun:    (moe-conformance run --engine (?:[\w./:+-]+|'[^'\n]*') --case [a-z0-9-]+(?: --seed [0-9]+)?)$"
)
# \b: so that a word without a dot is tried once, not from each of its letters.
_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\b\w+(?:\.\w+)+|[-+]?\d[\d.e+-]*")
# Limits of the terminal: lines of a message, characters of a line, faults. summary.md and the report show more.
LINES, LONG, SHOWN = 6, 300, 20


@dataclass(frozen=True)
class Fault:
    """hits: the column, which is an engine or a release, and the result."""

    bug_class: str
    check: str
    verdict: Verdict
    hits: tuple[tuple[str, Result], ...]

    @property
    def first(self) -> Result:
        return self.hits[0][1]

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(result.case for _, result in self.hits))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for column, _ in self.hits))

    @property
    def title(self) -> str:
        return f"{self.verdict.replace('_', ' ')}: {self.bug_class}: {self.check.replace('_', ' ')}"


def faults(columns: Columns) -> list[Fault]:
    """Those that fail a run come first; then by bug class, the most frequent first.

    A failed probe is one fault, whatever classes and checks its stage has: none of their cases was judged.
    """
    found: dict[tuple[object, ...], list[tuple[str, Result]]] = {}
    for column, results in columns.items():
        for result in results:
            if result.verdict.badness:
                of_check = () if _PROBED in result.message else (result.bug_class, result.check)
                key = (*of_check, result.verdict, distinct(result.message))
                found.setdefault(key, []).append((column, result))
    made = [Fault(hits[0][1].bug_class, hits[0][1].check, hits[0][1].verdict, tuple(hits)) for hits in found.values()]
    return sorted(made, key=lambda fault: (-fault.verdict.badness, fault.bug_class, -len(fault.hits)))


def own_words(message: str) -> str:
    """A failure's message without the check in front of it and the lines about its case after it."""
    said, mark, _ = message.rpartition(_ABOUT)
    return said.partition("\n")[2] if mark else message


def words(message: str, most: int = 200) -> str:
    """What is wrong, in one line."""
    said = _in_a_line(message)
    return said if len(said) <= most else f"{said[: most - 3]}..."


def _in_a_line(message: str) -> str:
    return " ".join(own_words(message).split()) or "no message"


def distinct(message: str) -> str:
    """The words of a message without lists, quoted and dotted names, and numbers; in time linear in its length."""
    text = _in_a_line(message)
    for first, last in ("[]", "()"):
        start, end = text.find(first), text.rfind(last)
        if -1 < start < end:
            text = f"{text[:start]}#{text[end + 1 :]}"
    return _VARIES.sub("#", text)


def command(result: Result) -> str:
    """The command that reruns it; empty if there is no such case.

    It is taken from the message, which has the engine as it was asked for.
    """
    if said := _RERUN.search(result.message):
        return said[1]
    case = catalogue().get(result.case)
    return rerun(result.engine, case) if case is not None else ""


def told(found: list[Fault]) -> Iterator[str]:
    """Lines for a terminal: each fault with the first of its messages, the cases behind it, and what reruns one."""
    for number, fault in enumerate(found[:SHOWN], 1):
        cases = len(fault.cases)
        yield ""
        yield f"{number}. {fault.title}"
        yield f"   {cases} case{'s' * (cases > 1)} of {', '.join(fault.columns)}; of {fault.first.case}:"
        lines = [line for line in own_words(fault.first.message).splitlines() if line.strip()]
        yield from (f"     {cut(line, LONG)}" for line in _folded(lines))
        if case := catalogue().get(fault.first.case):
            yield f"   {fault.first.level}: {case.contract.text}"
            if case.contract.upstream:
                yield f"   upstream: {', '.join(case.contract.upstream)}"
        if again := command(fault.first):
            yield f"   rerun: {again}"
    if left := found[SHOWN:]:
        yield ""
        yield f"and {len(left)} more distinct faults, {sum(len(fault.hits) for fault in left)} results"


def _folded(lines: list[str]) -> list[str]:
    """At most LINES of them, with a mark where some are left out.

    Of a golden's difference the lines that differ stay, and what stands beside them as far as there is room. Of
    anything else both ends: the end of a traceback matters most.
    """
    if len(lines) <= LINES:
        return lines
    room = LINES - 1
    differ = [place for place, line in enumerate(lines) if place and line.startswith(("- ", "+ "))]
    if not lines[0].startswith(DIFFERENCE) or not differ:
        kept = {*range(LINES // 2), *range(len(lines) - LINES // 2, len(lines))}
    elif len(differ) > room:
        kept = {0, *differ[: room - room // 2], *differ[-(room // 2) :]}
    else:
        beside = [place + step for step in (-1, 1) for place in differ if 0 < place + step < len(lines)]
        kept = {0, *list(dict.fromkeys([*differ, *beside]))[:room]}
    folded: list[str] = []
    after = 0
    for place in [*sorted(kept), len(lines)]:
        if place > after:
            folded.append(f"... {place - after} lines left out ..." if place - after > 1 else "... 1 line left out ...")
        folded += lines[place : place + 1]
        after = place + 1
    return folded
