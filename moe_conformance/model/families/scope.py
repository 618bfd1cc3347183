"""Reading a model config: one level of it, aliases of a key, and errors that say where was looked.

Every value is checked here, by type and bounds. A wrong one is a ConfigError, so that a config can cause no other
exception and no long computation.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_conformance.errors import ConfigError
from moe_conformance.model.families.bounds import DEEPEST, MOST_LAYERS, MOST_STEP, MOST_WIDTH
from moe_conformance.quote import plainly, quoted

# At most six digits: a longer number is not an index but an attack on int().
_INDEX = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Scope:
    """One level of a config. path: dotted, "" at the top. model: how the model is called in errors."""

    values: Mapping[str, Any]
    path: str
    model: str

    @property
    def where(self) -> str:
        return self.path or "the top level"

    def get(self, key: str) -> Any:
        """The value, or None where the key is absent or null."""
        return self.values.get(key)

    def error(self, what: str, problem: str) -> ConfigError:
        return ConfigError(f"{plainly(self.model)}: {what}: {problem} (in {self.where} of the config)")

    def find(self, what: str, keys: Sequence[str]) -> tuple[str, Any]:
        """The one value that is stored under any of `keys`; aliases must agree."""
        found = [(key, self.values[key]) for key in keys if self.get(key) is not None]
        if not found:
            raise self.error(what, f"found none of {', '.join(keys)}; set one of them")
        first, value = found[0]
        for key, other in found[1:]:
            if not _agree(value, other):
                raise self.error(what, f"{first} is {quoted(value)} but {key} is {quoted(other)}; keep one of them")
        return first, value

    def integer(self, what: str, keys: Sequence[str], least: int = 1, most: int = MOST_WIDTH) -> int:
        key, value = self.find(what, keys)
        return self.checked(what, key, value, least, most)

    def optional(self, what: str, key: str, default: int, least: int = 0, most: int = MOST_STEP) -> int:
        """An integer that the model's own config class gives a default."""
        value = self.get(key)
        return default if value is None else self.checked(what, key, value, least, most)

    def checked(self, what: str, key: str, value: Any, least: int, most: int, also: str = "") -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(what, f"{key}: got {quoted(value)}, want an integer from {least} to {most}{also}")
        return value

    def number(self, what: str, key: str, value: Any, least: float, most: float, also: str = "") -> int | float:
        """A number; a boolean is none. also: what else would be accepted, for the error."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.error(what, f"{key}: got {quoted(value)}, want a number from {least:g} to {most:g}{also}")
        return value

    def flag(self, what: str, key: str) -> bool:
        """A boolean, false where the key is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(what, f"{key}: got {quoted(value)}, want true or false")
        return bool(value)

    def sequence(self, what: str, key: str, value: Any, most: int = MOST_LAYERS) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or len(value) > most:
            raise self.error(what, f"{key}: got {quoted(value)}, want a list of at most {most} entries")
        return value

    def for_each_layer(self, what: str, key: str, value: Any, total: int) -> Sequence[Any]:
        """A list with one entry for each of the model's layers."""
        entries = self.sequence(what, key, value)
        if len(entries) != total:
            raise self.error(what, f"{key} has {len(entries)} entries for {total} layers; give one for each")
        return entries

    def below(self, what: str, key: str) -> Scope:
        """The level under a key, empty where there is none."""
        return Scope(self._mapping(what, key), f"{self.path}.{key}".lstrip("."), self.model)

    def _mapping(self, what: str, key: str) -> Mapping[Any, Any]:
        value = self.get(key)
        try:
            return {} if value is None else plain(value)
        except ConfigError:
            raise self.error(what, f"{key}: got {quoted(value)}, want a map") from None

    @cached_property
    def _by_layer(self) -> Mapping[int, Mapping[str, Any]]:
        """What per_layer_config says, by layer; its keys are indices, as text perhaps padded."""
        what, key, found = "layers", "per_layer_config", dict[int, Mapping[str, Any]]()
        for index, own in self._mapping(what, key).items():
            is_index = _INDEX.fullmatch(index) if isinstance(index, str) else type(index) is int and index >= 0
            if not is_index or not isinstance(own, Mapping):
                got = f"{quoted(index)}: {quoted(own)}"
                raise self.error(what, f"{key}: got {got}, want the index of a layer and a map")
            found.setdefault(int(index), own)
        return found

    def own(self, layer: int) -> Mapping[str, Any]:
        """What per_layer_config says of one layer."""
        return self._by_layer.get(layer, {})

    def at(self, layer: int) -> Scope:
        """This level as one layer sees it."""
        both: list[Any] = [self.own(layer), self.values]  # not a copy: for a large config that costs time in each layer
        return self._under(layer, ChainMap(*both)) if both[0] else self

    def _under(self, layer: int, values: Mapping[str, Any]) -> Scope:
        return Scope(values, f"{self.path}.per_layer_config[{layer}]".lstrip("."), self.model)

    def each(
        self, what: str, keys: Sequence[str], layers: Sequence[int], total: int, least: int, most: int = MOST_WIDTH
    ) -> tuple[int, ...]:
        """One integer for each of `layers`.

        Read, in this order, from per_layer_config (keyed by the layer's index), from a list with one entry for each
        of the model's `total` layers, or from one number for all of them.
        """
        found: list[int] = []
        common: tuple[str, Any] | None = None
        for layer in layers:
            own = self.own(layer)
            scope = self
            if any(own.get(key) is not None for key in keys):
                scope = self._under(layer, own)
                key, value = scope.find(what, keys)
            else:
                key, value = common = common or self.find(what, keys)
            if isinstance(value, list | tuple):
                value = scope.for_each_layer(what, key, value, total)[layer]
            found.append(scope.checked(what, key, value, least, most))
        return tuple(found)


def _agree(value: Any, other: Any) -> bool:
    """Equal texts or numbers, or lists of them; a list of one repeated number and that number included."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_equal, value, other))
    if isinstance(value, list | tuple) or isinstance(other, list | tuple):
        many, one = (value, other) if isinstance(value, list | tuple) else (other, value)
        return bool(many) and all(_equal(entry, one) for entry in many)
    return _equal(value, other)


def _equal(value: Any, other: Any) -> bool:
    """Maps, and lists within lists, never count as equal: comparing them could recurse to any depth."""
    simple = str | int | float | None
    return isinstance(value, simple) and isinstance(other, simple) and value == other


def plain(config: Any) -> Mapping[str, Any]:
    """A config as nested plain data: a mapping as it is, an object by its `to_dict`, else by its attributes."""
    try:
        if isinstance(config, Mapping):
            return config
        if hasattr(config, "to_dict"):
            found = config.to_dict()
            if not isinstance(found, Mapping):
                raise ConfigError(f"config: got {quoted(found)} from to_dict, want a map; pass the config's own dict")
            return found
        if hasattr(config, "__dict__"):
            return {key: value for key, value in vars(config).items() if not key.startswith("_")}
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config: {type(config).__name__} raised {quoted(error)} when read; pass its dict") from error
    raise ConfigError(f"config: got {type(config).__name__}, want a transformers config or its dict; pass the config")


def model_type_of(values: Mapping[str, Any]) -> str:
    """The model type that a level says, "" where it says none."""
    found = values.get("model_type")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"model_type: got {quoted(found)}, want text; set it to the family's name")
    return found or ""


def levels(
    values: Mapping[str, Any], children: Sequence[str], path: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config's levels, each with its path: what lies under `children` (in their order), then the level itself."""
    for key in children:
        child = values.get(key)
        # By type(): an object may raise when asked for __class__.
        if child is not None and not issubclass(type(child), (str, int, list, tuple)):
            if depth == DEEPEST:
                raise ConfigError(f"{path}: got a level below it, want at most {DEEPEST} levels below the top")
            yield from levels(plain(child), children, f"{path}.{key}".lstrip("."), depth + 1)
    yield path, values
