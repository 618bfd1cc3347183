"""What was judged of several releases: tables of bug class by release, and each distinct fault in a line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from moe_conformance.catalogue.clauses import BUG_CLASSES, Level
from moe_conformance.judging.verdict import Result, Verdict

WIDTH = 100
Releases = Mapping[str, Sequence[Result]]


def tables(releases: Releases) -> Iterator[str]:
    """Three tables, in blocks of as many releases as fit WIDTH columns."""
    titles: list[tuple[str, Callable[[Sequence[Result]], str]]] = [
        ("MUST: failed of judged", lambda results: _share(results, "MUST")),
        ("SHOULD: broken of judged", lambda results: _share(results, "SHOULD")),
        ("not judged", _not_judged),
    ]
    for title, cell in titles:
        rows = {
            name: {version: cell([r for r in results if r.bug_class == name]) for version, results in releases.items()}
            for name in (*BUG_CLASSES, "?")
        }
        shown = {name: cells for name, cells in rows.items() if any(cells.values())}
        if shown:
            yield from _blocks(title, shown, list(releases))


def _blocks(title: str, rows: Mapping[str, Mapping[str, str]], releases: list[str]) -> Iterator[str]:
    first = max(map(len, (title, *rows)))
    widths = {version: max(len(version), *(len(row[version]) for row in rows.values())) for version in releases}
    while releases:
        used, taken = first, []
        while releases and (not taken or used + 2 + widths[releases[0]] <= WIDTH):
            used += 2 + widths[releases[0]]
            taken.append(releases.pop(0))
        yield ""
        yield _line(title, {version: version for version in taken}, first, widths)
        for name, cells in rows.items():
            yield _line(name, {version: cells[version] or "-" for version in taken}, first, widths)


def _line(name: str, cells: Mapping[str, str], first: int, widths: Mapping[str, int]) -> str:
    return "  ".join([name.ljust(first), *(cell.rjust(widths[version]) for version, cell in cells.items())])


def _share(results: Sequence[Result], level: Level) -> str:
    judged = [result for result in results if result.level == level and result.verdict.was_judged]
    bad = sum(result.verdict.badness > 0 for result in judged)
    return f"{bad}/{len(judged)}" if judged else ""


def _not_judged(results: Sequence[Result]) -> str:
    away = sum(not result.verdict.was_judged for result in results)
    return f"{away}/{len(results)}" if away else ""


def faults(releases: Releases, again: Callable[[str, str], str]) -> Iterator[str]:
    """A line for each distinct fault: of one check, in words that are the same up to numbers, names and lists.

    again: the command that judges a case of a release once more.
    """
    found: dict[tuple[str, str, str, str], list[tuple[str, Result]]] = {}
    for version, results in releases.items():
        for result in results:
            if result.verdict.badness and result.verdict is not Verdict.UNAVAILABLE:
                key = (result.bug_class, result.check, result.verdict.value, distinct(result.message))
                found.setdefault(key, []).append((version, result))
    versions = list(releases)
    for (bug_class, check, verdict, _), hits in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        cases = len({result.case for _, result in hits})
        version, result = hits[-1]
        yield f"{bug_class}: {verdict.replace('_', ' ')}: {check}: {words(result.message)}"
        yield f"    {cases} case{'s' * (cases > 1)}, {_spans({version for version, _ in hits}, versions)}"
        yield f"    {again(version, result.case)}"


def words(message: str, most: int = 200) -> str:
    """What is wrong: a failure's message without its check, which comes first, and what is said of its case below."""
    said = _words(message)
    return said if len(said) <= most else f"{said[: most - 3]}..."


def _words(message: str) -> str:
    lines = [line.strip() for line in message.partition("\nstage: ")[0].splitlines()]
    return " ".join(filter(None, lines[1:] or lines)) or "no message"


def distinct(message: str) -> str:
    """The words of a message without lists, quoted and dotted names, and numbers."""
    return re.sub(r"\[.*\]|\(.*\)|'[^']*'|\"[^\"]*\"|\w+(\.\w+)+|[-+]?\d[\d.e+-]*", "#", _words(message))


def _spans(some: Iterable[str], versions: Sequence[str]) -> str:
    """For instance "0.19.0 to 0.22.1, 0.28.0"."""
    places = sorted(versions.index(version) for version in some)
    spans = []
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        members = [versions[place] for _, place in run]
        spans.append(members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}")
    return ", ".join(spans)


def stages(found: Iterable[str]) -> str:
    """How far a run is: results by stage."""
    counts = Counter(found)
    return ", ".join(f"{stage} {count}" for stage, count in sorted(counts.items()))
