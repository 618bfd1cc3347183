"""Finding engines: by entry point name, or as package.module:Class. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from moe_conformance.engine import Engine
from moe_conformance.errors import UsageError

GROUP = "moe_conformance.engines"


@dataclass(frozen=True)
class Target:
    """An engine to judge: the name it is reported under, and where its class is."""

    name: str
    path: str

    @property
    def asked_as(self) -> str:
        """What --engine takes for it."""
        return self.name if self.name in registered() else self.path

    def load(self) -> Any:
        """The adapter class. Raises UsageError if the path names nothing."""
        module_name, _, class_name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"engine {self.name!r}: cannot load {self.path}: {error}") from error

    def offers(self, stage: str) -> bool:
        """Whether the class has a method of its own for the stage; what it declares is asked when it runs."""
        method = getattr(self.load(), stage, None)
        return method is not None and method is not getattr(Engine, stage)


def registered() -> dict[str, Target]:
    """Engines registered as entry points, by name. Listing them imports none of them."""
    return {point.name: Target(point.name, point.value) for point in entry_points(group=GROUP)}


def resolve(name: str) -> Target:
    """The target for `NAME` or `package.module:Class`. Raises UsageError that lists what there is."""
    known = registered()
    if name in known:
        return known[name]
    if ":" in name:
        extend_path()
        target = Target(name, name)
        cls = target.load()
        return Target(getattr(cls, "name", "") or cls.__name__, name)
    near = get_close_matches(name, known, n=1)
    raise UsageError(
        f"engine: got {name!r}, want one of {', '.join(sorted(known))}, or package.module:Class"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def available() -> list[Target]:
    """Registered engines that can start here, as far as a cheap look tells."""
    return [target for target in registered().values() if missing(target) is None]


def missing(target: Target) -> str | None:
    """Why an engine cannot start here, or None."""
    try:
        probe = getattr(target.load(), "missing", None)
    except UsageError as error:
        return str(error)
    return probe() if probe else None


def extend_path() -> None:
    """Let adapters in the working directory be imported, after everything installed.

    Not from this project's own checkout, whose folder `kernels` would shadow Hugging Face's package.
    """
    import moe_conformance.suites

    here = os.getcwd()
    checkout = {Path(folder).resolve().parent for folder in moe_conformance.suites.__path__}
    if here not in sys.path and Path(here).resolve() not in checkout:
        sys.path.append(here)
