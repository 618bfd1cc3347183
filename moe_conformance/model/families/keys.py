"""Reading what decides a layer's method: a key of the config, what its value means, and its default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_conformance.model.families.bounds import MOST
from moe_conformance.model.families.scope import Scope
from moe_conformance.quote import quoted

WHAT = "MoE method"


@dataclass(frozen=True)
class Key:
    """A key of the config that decides a field.

    name: one name or several; those that are set must agree. default: the config class's own, for a plain dict without
    the key. of: the meaning of its value, as a table of legal values or a function of a number or null; without it the
    value is a number. per_layer: the value is null or a list with an entry for each decoder layer (a longer list goes
    on with draft layers). least, most: of a number. whole: it is an integer.
    """

    name: str | tuple[str, ...]
    default: Any
    of: Mapping[Any, Any] | Callable[[Any], Any] | None = None
    per_layer: bool = False
    least: float = -MOST
    most: float = MOST
    whole: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if isinstance(self.name, str) else self.name

    def read(self, scope: Scope, layer: int) -> Any:
        """What the config says, or ConfigError with the key, its value and what it may be."""
        name, value = self._stored(scope)
        if self.per_layer and value is not None:
            if not isinstance(value, list | tuple) or len(value) <= layer:
                raise scope.error(
                    WHAT, f"{name}: got {quoted(value)}, want null or a list with an entry for each layer"
                )
            value = value[layer]
        if isinstance(self.of, Mapping):
            for known, meaning in self.of.items():
                if type(known) is type(value) and known == value:
                    return meaning
            raise scope.error(WHAT, f"{name}: got {quoted(value)}, want one of {', '.join(map(repr, self.of))}")
        if value is None and self.of is not None:
            return self.of(None)
        also = " or null" if self.of else ""
        if self.whole:
            value = scope.checked(WHAT, name, value, int(self.least), int(self.most), also)
        else:
            value = scope.number(WHAT, name, value, self.least, self.most, also)
        return value if self.of is None else self.of(value)

    def _stored(self, scope: Scope) -> tuple[str, Any]:
        if any(scope.get(name) is not None for name in self.names):
            return scope.find(WHAT, self.names)
        null = any(name in scope.values for name in self.names)
        return self.names[0], None if null else self.default


def resolve(field: Any, scope: Scope, layer: int) -> Any:
    """A field with what the config decides resolved: Keys, functions of (scope, layer), and tables of both."""
    if isinstance(field, Key):
        return resolve(field.read(scope, layer), scope, layer)
    if isinstance(field, Mapping):
        return {name: resolve(entry, scope, layer) for name, entry in field.items()}
    return resolve(field(scope, layer), scope, layer) if callable(field) else field


def is_of_each_layer(field: Any) -> bool:
    """Whether a field may differ from layer to layer of a config without per_layer_config."""
    if isinstance(field, Key):
        return field.per_layer or (isinstance(field.of, Mapping) and is_of_each_layer(field.of))
    return any(map(is_of_each_layer, field.values())) if isinstance(field, Mapping) else callable(field)


def keys_in(field: Any) -> Iterator[Key]:
    """Every Key that a field may read."""
    if isinstance(field, Key):
        yield field
        field = field.of
    if isinstance(field, Mapping):
        for entry in field.values():
            yield from keys_in(entry)
