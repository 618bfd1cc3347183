"""The judgement of a record, for the forms that `checkpoint` is printed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_conformance.checkpoints.findings import Finding
from moe_conformance.quote import plainly

# Of one row in one layer, as --json prints them.
CODES = ("equal", "within", "carried", "wrong")
EQUAL, WITHIN, CARRIED, WRONG = range(4)


@dataclass(frozen=True)
class Layer:
    """Rows of one layer, by what they are. expected: how many rounding alone is expected to change."""

    layer: int
    equal: int
    within: int
    carried: int
    wrong: int
    expected: float


@dataclass(frozen=True)
class Judgement:
    """cells: of each request its name and, of each row, a digit for each layer with experts."""

    folder: str
    record: str
    model: str
    dtype: str
    requests: int
    layers: tuple[Layer, ...]
    cells: tuple[tuple[str, tuple[str, ...]], ...]
    expected: float
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return not any(finding.level == "defect" for finding in self.findings)

    @property
    def rows(self) -> int:
        return sum(len(rows) for _, rows in self.cells)

    @property
    def heading(self) -> str:
        requests = f"{self.requests:,} request{'s' * (self.requests != 1)}"
        return f"{plainly(self.record)}: {requests}, {self.rows:,} rows; {self.model}, {self.dtype}"

    @property
    def outcome(self) -> str:
        defects = sum(finding.level == "defect" for finding in self.findings)
        notes = len(self.findings) - defects
        differ = sum(layer.within + layer.carried + layer.wrong for layer in self.layers)
        every = self.rows * len(self.layers)
        counts = ", ".join(
            f"{count or 'no'} {what}{'s' * (count != 1)}" for count, what in ((defects, "defect"), (notes, "note"))
        )
        return f"{counts}; {differ:,} of {every:,} choices are others, {self.expected:,.0f} expected by rounding"

    def lines(self) -> Iterator[str]:
        """A table, a row a layer; aligned, and Markdown all the same."""
        yield "| layer | equal | within rounding | carried | wrong | expected to differ |"
        yield "|------:|------:|----------------:|--------:|------:|-------------------:|"
        for one in self.layers:
            yield (
                f"| {one.layer:5} | {one.equal:5} | {one.within:15} | {one.carried:7} | {one.wrong:5} "
                f"| {one.expected:18.1f} |"
            )

    def facts(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "record": self.record,
            "sound": self.is_sound,
            "model": self.model,
            "dtype": self.dtype,
            "requests": self.requests,
            "rows": self.rows,
            "expected": round(self.expected, 3),
            "layers": [vars(layer) for layer in self.layers],
            "cells": [{"request": name, "rows": list(rows)} for name, rows in self.cells],
        }
