"""Fields of inputs that an earlier protocol had: reading one says what took its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class HadOtherFields:
    """Base of a dataclass whose fields changed. gone: old field -> what is read instead."""

    gone: ClassVar[Mapping[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name in type(self).gone:
            instead = type(self).gone[name]
            raise AttributeError(f"{kind}.{name} is gone since protocol 2; use {instead} (docs/migrating.md)")
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")
