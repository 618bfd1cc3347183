"""The findings of `checkpoint`: each with its place, got and want, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# defect: an engine refuses the folder, leaves a weight as it was, or computes with a wrong one. note: worth knowing.
Level = Literal["defect", "note"]
# How many names one finding lists; it always gives their number.
MOST_LISTED = 1000


@dataclass(frozen=True)
class Finding:
    """kind: a word for machines.

    tensors: the first that are meant, of `count`. files: where each of them is, or should be; of a finding without
    tensors, the files that are meant.
    """

    kind: str
    files: tuple[str, ...]
    tensors: tuple[str, ...]
    got: str
    want: str
    do: str
    level: Level = "defect"
    count: int = 1


@dataclass
class Findings:
    """Collects findings; those that differ in nothing but the place become one."""

    _found: dict[tuple[str, Level, str, str, str], _Places] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        file: str,
        tensors: str | Sequence[str] = (),
        *,
        got: str,
        want: str,
        do: str,
        level: Level = "defect",
        count: int | None = None,
    ) -> None:
        """count: the number of tensors, if not all of them are listed."""
        names = (tensors,) if isinstance(tensors, str) else tuple(tensors)
        places = self._found.setdefault((kind, level, got, want, do), _Places())
        kept = names[: MOST_LISTED - len(places.tensors)]
        places.tensors += kept
        places.files += [file] * len(kept) if names else [file]
        places.count += max(len(names), 1) if count is None else count

    def all(self) -> tuple[Finding, ...]:
        """Defects first, each kind in the order in which it was met."""
        merged = (
            Finding(kind, tuple(places.files), tuple(places.tensors), got, want, do, level, places.count)
            for (kind, level, got, want, do), places in self._found.items()
        )
        return tuple(sorted(merged, key=lambda finding: finding.level != "defect"))


@dataclass
class _Places:
    files: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    count: int = 0
