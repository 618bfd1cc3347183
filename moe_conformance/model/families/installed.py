"""Which families with experts the installed transformers has. Read from its source; nothing is imported.

A config class has experts if one of its attributes is named like a number of experts. A family is listed even if this
project never reads its class: one that is not named would read as a pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from moe_conformance.model.families.families import RECORDS

_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_MODEL_TYPE = re.compile(r"^    model_type(?:: *\w+)? *= *[\"']([^\"']+)[\"']", re.MULTILINE)
# An attribute, an argument, or one of the constructor's own.
_EXPERTS = re.compile(
    r"^ +(?:self\.)?(?:\w*num_(?:\w+_)?experts|n_(?:routed|shared)_experts|pyramid_num_routed)\b *[:=]", re.M
)


@dataclass(frozen=True)
class Installed:
    """version: of transformers. all: every model type. experts: model types with experts -> their config class."""

    version: str
    all: frozenset[str]
    experts: Mapping[str, str]

    @property
    def without_record(self) -> tuple[str, ...]:
        """Model types with experts that no record describes."""
        return tuple(sorted(name for name in self.experts if not RECORDS.name_of(name)))

    @property
    def absent(self) -> tuple[str, ...]:
        """Model types of records that the installed transformers does not have."""
        return tuple(sorted(name for name in RECORDS if name not in self.all))


def installed() -> Installed | None:
    """What the installed transformers has; None without one."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        which = version("transformers")
    except PackageNotFoundError:
        which = "of unknown version"
    folder = Path(next(iter(found.submodule_search_locations))) / "models"
    return read(which, (path.read_text("utf-8", "replace") for path in sorted(folder.glob("*/configuration_*.py"))))


def read(which: str, sources: Iterable[str]) -> Installed:
    """which: the version. sources: of the configuration files."""
    every: set[str] = set()
    experts: dict[str, str] = {}
    for source in sources:
        every.update(_MODEL_TYPE.findall(source))
        if "experts" not in source:
            continue
        starts = [match.start() for match in _CLASS.finditer(source)]
        classes = [source[start:end] for start, end in zip(starts, [*starts[1:], len(source)], strict=True)]
        typed = [(found[1], text) for text in classes if (found := _MODEL_TYPE.search(text))]
        # A class without a model type is part of a config: its experts count for every model type in the file.
        part = any(_EXPERTS.search(text) and not _MODEL_TYPE.search(text) for text in classes)
        experts |= {name: _CLASS.match(text)[1] for name, text in typed if part or _EXPERTS.search(text)}  # type: ignore[index]
    return Installed(which, frozenset(every), experts)
