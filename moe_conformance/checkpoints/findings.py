"""What `checkpoint` finds: each with its place, what was got against what is wanted, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

# defect: an engine refuses the folder, leaves a weight as it was, or computes with a wrong one. note: worth knowing.
Level = Literal["defect", "note"]
# Names that one finding lists; how many there are it says in any case.
MOST_LISTED = 1000


@dataclass(frozen=True)
class Finding:
    """kind: a word for machines. tensors: the first that are meant, of `count`; file: where the first of them is."""

    kind: str
    file: str
    tensors: tuple[str, ...]
    got: str
    want: str
    do: str
    level: Level = "defect"
    count: int = 1


@dataclass
class Findings:
    """Collects findings; those that differ in nothing but the tensor become one."""

    _found: dict[tuple[str, ...], tuple[Finding, list[str], list[int]]] = field(default_factory=dict)

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
        """count: of tensors, where not all that are meant are given."""
        names = (tensors,) if isinstance(tensors, str) else tuple(tensors)
        finding = Finding(kind, file, (), got, want, do, level)
        _, held, total = self._found.setdefault((kind, level, got, want, do), (finding, [], [0]))
        held += names[: MOST_LISTED - len(held)]
        total[0] += len(names) if count is None else count

    def all(self) -> tuple[Finding, ...]:
        """Defects first, each kind in the order in which it was met."""
        merged: Iterable[Finding] = (
            Finding(one.kind, one.file, tuple(held), one.got, one.want, one.do, one.level, max(total[0], 1))
            for one, held, total in self._found.values()
        )
        return tuple(sorted(merged, key=lambda finding: finding.level != "defect"))
