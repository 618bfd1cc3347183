"""Golden snapshots: one Amber file a (bug class, check), one entry a case, the same for every engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from syrupy.extensions.amber import AmberSnapshotExtension

import moe_conformance.golden

FOLDER = Path(moe_conformance.golden.__path__[0])


class Amber(AmberSnapshotExtension):
    """Stores at golden/<bug class>/<check>.ambr under the case id, whatever test and engine asked."""

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
