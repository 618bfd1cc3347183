"""Finding engines: by entry point name, as package.module:Class or file.py:Class. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from moe_conformance.errors import UsageError

GROUP = "moe_conformance.engines"


@dataclass(frozen=True)
class Target:
    """An engine to judge: the name it is reported under, and where its class is."""

    name: str
    path: str

    @property
    def asked_as(self) -> str:
        """What to pass to --engine for it."""
        return self.name if self.name in registered() else self.path

    def load(self) -> Any:
        """The adapter class. Raises UsageError if the path names nothing."""
        module_name, _, class_name = self.path.rpartition(":")
        try:
            if module_name.endswith(".py"):
                module_name = _importable(Path(module_name))
            return getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"engine {self.name!r}: cannot load {self.path}: {error}") from error


def _importable(file: Path) -> str:
    """The module name of a file, whose folder is on the path from now on, after everything installed.

    Under its own name, by which processes that the engine starts find it, too. Raises ImportError where that name is
    another's.
    """
    if not file.is_file():
        raise ImportError(f"got no file {file}, want an adapter's")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    found = importlib.util.find_spec(file.stem)
    if found is None or found.origin is None or not os.path.samefile(found.origin, file):
        raise ImportError(f"{file.stem} is the name of {found.origin if found else 'no module'}, too; rename the file")
    return file.stem


def registered() -> dict[str, Target]:
    """Engines registered as entry points, by name. Listing them imports none of them.

    Raises UsageError where two packages register different engines under one name.
    """
    found: dict[str, Target] = {}
    for point in entry_points(group=GROUP):
        target = found.setdefault(point.name, Target(point.name, point.value))
        if target.path != point.value:
            raise UsageError(
                f"entry point {point.name!r} of {GROUP}: got {target.path} and {point.value}, want one engine of a "
                "name; uninstall one of their packages"
            )
    return found


def resolve(name: str) -> Target:
    """The target for `NAME`, `package.module:Class` or `file.py:Class`, without importing it.

    An unregistered engine goes by its path until it was asked for its name. Raises UsageError that lists what there is.
    """
    known = registered()
    if name in known:
        return known[name]
    if ":" in name:
        return next((target for target in known.values() if target.path == name), Target(name, name))
    near = get_close_matches(name, known, n=1)
    raise UsageError(
        f"engine: got {name!r}, want one of {', '.join(sorted(known))}, package.module:Class or file.py:Class"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def extend_path() -> None:
    """Let adapters in the working directory be imported, after everything installed.

    Not from this project's own checkout, whose folder `kernels` would shadow Hugging Face's package.
    """
    import moe_conformance.suites

    here = os.getcwd()
    checkout = {Path(folder).resolve().parent for folder in moe_conformance.suites.__path__}
    if here not in sys.path and Path(here).resolve() not in checkout:
        sys.path.append(here)
