"""Fields of inputs that an earlier protocol had: using one raises with the name of its replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self


class HadOtherFields:
    """Base of a dataclass whose fields changed. gone: old field -> what is read instead."""

    gone: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *values: Any, **named: Any) -> Self:
        for name in named:
            if name in cls.gone and name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise TypeError(cls._instead_of(name))
        return super().__new__(cls)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).gone:
            raise AttributeError(type(self)._instead_of(name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def _instead_of(cls, name: str) -> str:
        return f"{cls.__name__}.{name} is gone since protocol 2; use {cls.gone[name]} (docs/migrating.md)"
