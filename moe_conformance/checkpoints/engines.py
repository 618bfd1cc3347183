"""Whether the installed engines know the model's architecture, read from their source; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG
from moe_conformance.quote import plainly

# The file in which each lists its architectures, relative to its package.
PLACES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("model_executor/models/registry.py",),
    "sglang": ("srt/models/*.py",),
    "transformers": ("models/auto/modeling_auto.py",),
}


def unheard_of(config: Mapping[str, Any], findings: Findings) -> None:
    """A note for each installed engine whose source does not name the architecture."""
    found = config.get("architectures")
    names = [name for name in found if isinstance(name, str) and name.isidentifier()] if isinstance(found, list) else []
    for package in PLACES if names else ():
        if package == "transformers" and config.get("auto_map"):
            continue  # the folder brings the code
        sources = _sources(package, config)
        first = next(sources, None)
        if first is not None and not any(_has(names[0], text) for text in chain((first,), sources)):
            findings.add(
                "engine",
                CONFIG,
                got=f"architecture {plainly(names[0])}, which {package} {_version(package)} does not have",
                want="one that it has",
                do=f"do not serve it with this {package} unless the model brings its own code",
                level="note",
            )


def _has(architecture: str, source: str) -> bool:
    return f'"{architecture}"' in source or f"class {architecture}(" in source


def _sources(package: str, config: Mapping[str, Any]) -> Iterator[str]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(next(iter(spec.submodule_search_locations)))
    family = str(config.get("model_type")).partition("_")[0]
    own = (f"models/{family}*/modeling_*.py",) if package == "transformers" and family.isalnum() else ()
    for pattern in PLACES[package] + own:
        for path in folder.glob(pattern):
            try:
                yield path.read_text("utf-8", "replace")
            except OSError:
                continue


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
