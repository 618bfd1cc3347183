"""Golden snapshots: one Amber file a (bug class, check), one entry a case, the same for every engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from syrupy.extensions.amber import AmberSnapshotExtension

import moe_conformance.golden

FOLDER = Path(moe_conformance.golden.__path__[0])


class Amber(AmberSnapshotExtension):
    """Stores at golden/<bug class>/<check>.ambr under the case id, for every test and engine."""

    place = FOLDER

    @classmethod
    @cache
    def at(cls, bug_class: str, check: str) -> type[Amber]:
        return type("Amber", (Amber,), {"place": FOLDER / bug_class / check})

    @classmethod
    def dirname(cls, **_: Any) -> str:
        return str(cls.place.parent)

    @classmethod
    def get_file_basename(cls, **_: Any) -> str:
        return cls.place.name

    @classmethod
    def get_snapshot_name(cls, *, index: Any = 0, **_: Any) -> str:
        return str(index)

    @classmethod
    def matches_test_location(cls, **_: Any) -> bool:
        return True


@cache
def recorded(bug_class: str, check: str) -> dict[str, str]:
    """Serialised facts of each case in one golden file; empty where there is no file."""
    file = FOLDER / bug_class / f"{check}.{Amber.file_extension}"
    if not file.exists():
        return {}
    return {snapshot.name: str(snapshot.data) for snapshot in Amber.serializer_class.read_file(str(file))}


def matches(bug_class: str, check: str, case: str, facts: Any) -> bool:
    """Whether facts are what the golden says, outside a pytest session."""
    return recorded(bug_class, check).get(case) == Amber().serialize(facts)
