"""A judgement in words: as text, as Markdown, and as JSON for machines; of a checkpoint, or of a record of routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from moe_conformance.checkpoints.findings import Finding
from moe_conformance.quote import plainly

SHOWN = 3  # names of tensors in a line
MOST = 200  # findings that somebody reads


class Judged(Protocol):
    """What is printed of a judgement. lines: a table between heading and findings. facts: for machines."""

    @property
    def folder(self) -> str: ...
    @property
    def heading(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def findings(self) -> tuple[Finding, ...]: ...
    def lines(self) -> Iterator[str]: ...
    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Judgement:
    """model: what it was taken for, in words. record: whether a record has its names. values: they were read, too."""

    folder: str
    model: str
    record: bool
    tensors: int
    shards: int
    size: int
    values: bool
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return not any(finding.level == "defect" for finding in self.findings)

    @property
    def heading(self) -> str:
        files = _count(self.shards, "file")
        return f"{plainly(self.model)}; {self.tensors:,} tensors in {files}, {_bytes(self.size)}"

    @property
    def outcome(self) -> str:
        defects = sum(finding.level == "defect" for finding in self.findings)
        notes = len(self.findings) - defects
        read = "headers and values" if self.values else "headers alone; --values reads the numbers too"
        return f"{_count(defects, 'defect')}, {_count(notes, 'note')} ({read})"

    def lines(self) -> Iterator[str]:
        yield from ()

    def facts(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "sound": self.is_sound,
            "model": self.model,
            "record": self.record,
            "tensors": self.tensors,
            "files": self.shards,
            "bytes": self.size,
            "values": self.values,
        }


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


def _what(finding: Finding) -> str:
    shown = ", ".join(plainly(name) for name in finding.tensors[:SHOWN])
    more = finding.count - min(len(finding.tensors), SHOWN) if finding.tensors else 0
    return shown + (f" and {more:,} more" if more > 0 else "")


def _where(finding: Finding) -> str:
    first, *others = dict.fromkeys(finding.files)
    return plainly(first) + (f" and {_count(len(others), 'more file')}" if others else "")


def text(judgement: Judged) -> str:
    return "\n".join(_lines(judgement))


def _lines(judgement: Judged) -> Iterator[str]:
    yield f"{plainly(judgement.folder)}: {judgement.heading}"
    table = list(judgement.lines())
    yield from ["", *table] if table else []
    for finding in judgement.findings[:MOST]:
        yield ""
        yield f"{finding.level}: {finding.kind}: {_where(finding)}"
        if finding.tensors:
            yield f"  {_what(finding)}"
        yield f"  got {finding.got}"
        yield f"  want {finding.want}"
        yield f"  {finding.do}"
    if more := _more(judgement):
        yield from ("", more)
    yield ""
    yield judgement.outcome


def _more(judgement: Judged) -> str:
    beyond = len(judgement.findings) - MOST
    return f"... and {_count(beyond, 'more finding')}; --json has them all" if beyond > 0 else ""


def markdown(judgement: Judged) -> str:
    lines = [f"# `{_cell(plainly(judgement.folder))}`", "", f"{judgement.heading}.", "", f"**{judgement.outcome}**"]
    table = list(judgement.lines())
    lines += ["", *table] if table else []
    if judgement.findings:
        lines += ["", "| | what | file | tensor | got | want | to do |", "|---|---|---|---|---|---|---|"]
    for finding in judgement.findings[:MOST]:
        cells = (
            finding.level,
            finding.kind,
            _where(finding),
            _what(finding),
            finding.got,
            finding.want,
            finding.do,
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    if more := _more(judgement):
        lines += ["", more]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def as_json(judgement: Judged) -> str:
    """ASCII alone, so that no name of a tensor can do harm to a terminal."""
    found: dict[str, Any] = {
        **judgement.facts(),
        "findings": [
            {**vars(finding), "files": list(map(plainly, finding.files)), "tensors": list(finding.tensors)}
            for finding in judgement.findings
        ],
    }
    return json.dumps(found, indent=2)
