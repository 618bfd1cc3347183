"""How many failed of how many: bug classes down, engines or releases across, one table for each kind of result.

The terminal, summary.md, the HTML report and tools/releases.py show the same numbers, from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.judging.verdict import Result, Verdict

WIDTH = 100
# Results by engine, or by release of one engine.
Columns = Mapping[str, Sequence[Result]]
# Every result is in one of these: kind -> title.
KINDS = {
    "must": "MUST: failed of judged",
    "should": "SHOULD: broken of judged",
    "known": "known failures",
    "away": "not judged, of what it has",
    "absent": "absent from the engine, of all",
}


@dataclass
class Count:
    """Results of one kind in one cell.

    bad: those that failed.
    """

    bad: int = 0
    all: int = 0


@dataclass
class Cell:
    """The results of one bug class in one column."""

    must: Count
    should: Count
    known: Count
    away: Count
    absent: Count

    @classmethod
    def empty(cls) -> Cell:
        return cls(Count(), Count(), Count(), Count(), Count())

    def add(self, result: Result) -> None:
        count: Count = getattr(self, kind(result))
        count.all += 1
        count.bad += result.verdict.badness > 0

    def text(self, name: str) -> str:
        """The cell's text in a table of this kind; empty if there is nothing to show."""
        count: Count = getattr(self, name)
        if not count.all:
            return ""
        if name == "known":
            return str(count.all)
        if name == "away":
            return f"{count.all}/{self.total - self.absent.all}"
        if name == "absent":
            return f"{count.all}/{self.total}"
        return f"{count.bad}/{count.all}"

    @property
    def total(self) -> int:
        return self.must.all + self.should.all + self.known.all + self.away.all + self.absent.all


def kind(result: Result) -> str:
    """One of KINDS. A known failure counts neither as a failed MUST nor as a broken SHOULD."""
    if result.verdict is Verdict.ABSENT:
        return "absent"
    if not result.verdict.was_judged:
        return "away"
    if result.verdict is Verdict.KNOWN_FAILURE:
        return "known"
    return result.level.lower()


@dataclass(frozen=True)
class Table:
    """rows: bug class -> column -> cell, of every column; without classes that have nothing of this kind."""

    title: str
    rows: Mapping[str, Mapping[str, str]]


def cells(columns: Columns) -> dict[str, dict[str, Cell]]:
    """Bug class -> column -> cell, where there is any result; classes in the order of the contract."""
    found: dict[str, dict[str, Cell]] = {}
    for column, results in columns.items():
        for result in results:
            row = found.setdefault(result.bug_class, {})
            if column not in row:
                row[column] = Cell.empty()
            row[column].add(result)
    # After the contract's classes: "?" for results that were lost before their class was known, and classes of other
    # releases.
    return {name: found[name] for name in (*BUG_CLASSES, *sorted(found.keys() - {*BUG_CLASSES})) if name in found}


def tables(columns: Columns) -> list[Table]:
    """A table for each kind of result that occurs."""
    counted = cells(columns)
    made = []
    for name, title in KINDS.items():
        rows = {
            bug_class: {column: row[column].text(name) if column in row else "" for column in columns}
            for bug_class, row in counted.items()
        }
        if shown := {bug_class: row for bug_class, row in rows.items() if any(row.values())}:
            made.append(Table(title, shown))
    return made


def as_text(columns: Columns) -> Iterator[str]:
    """The tables with common column widths, each in blocks of as many columns as fit WIDTH."""
    made = tables(columns)
    first = max((len(text) for table in made for text in (table.title, *table.rows)), default=0)
    heads = {column: cut(column, WIDTH - first - 2) for column in columns}
    widths = {
        column: max(len(heads[column]), *(len(row[column]) for table in made for row in table.rows.values()))
        for column in columns
        if made
    }
    for table in made:
        left = list(columns)
        while left:
            used = first
            taken: list[str] = []
            while left and (not taken or used + 2 + widths[left[0]] <= WIDTH):
                used += 2 + widths[left[0]]
                taken.append(left.pop(0))
            yield ""
            yield _line(table.title, {column: heads[column] for column in taken}, first, widths)
            for name, row in table.rows.items():
                yield _line(name, {column: row[column] or "-" for column in taken}, first, widths)


def as_markdown(columns: Columns) -> Iterator[str]:
    """The tables, as lines of Markdown."""
    for table in tables(columns):
        yield f"| {table.title} | {' | '.join(columns)} |"
        yield "|---" + "|---:" * len(columns) + "|"
        yield from (
            f"| {name} | {' | '.join(row[column] or '-' for column in columns)} |" for name, row in table.rows.items()
        )
        yield ""


def cut(text: str, most: int) -> str:
    """The text, with its middle left out where it is longer than `most`."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _line(name: str, row: Mapping[str, str], first: int, widths: Mapping[str, int]) -> str:
    return "  ".join([name.ljust(first), *(cell.rjust(widths[column]) for column, cell in row.items())])
