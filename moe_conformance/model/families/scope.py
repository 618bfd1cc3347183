"""Reading a model config: one level of it, several names for one thing, and errors that say where was looked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_conformance.errors import ConfigError


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

    def below(self, key: str) -> Scope:
        """The level under a key, empty where there is none."""
        return Scope(plain(self.get(key) or {}), f"{self.path}.{key}".lstrip("."), self.model)

    def own(self, layer: int) -> Mapping[str, Any]:
        """What per_layer_config says of one layer; its keys are indices, as text perhaps padded."""
        layers: Mapping[Any, Mapping[str, Any]] = self.get("per_layer_config") or {}
        return next((own for index, own in layers.items() if int(index) == layer), {})

    def at(self, layer: int, only: bool = False) -> Scope:
        """This level as one layer sees it, or only what per_layer_config says of that layer."""
        own = self.own(layer)
        path = f"{self.path}.per_layer_config[{layer}]".lstrip(".") if own else self.path
        return Scope(own if only else {**self.values, **own}, path, self.model)

    def error(self, what: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.model}: {what}: {problem} (in {self.where} of the config)")

    def find(self, what: str, keys: Sequence[str]) -> tuple[str, Any]:
        """The one value that is stored under any of `keys`; aliases must agree."""
        found = [(key, self.values[key]) for key in keys if self.get(key) is not None]
        if not found:
            raise self.error(what, f"found none of {', '.join(keys)}; set one of them")
        first, value = found[0]
        for key, other in found[1:]:
            if not _agree(value, other):
                raise self.error(what, f"{first} is {value!r} but {key} is {other!r}; keep one of them")
        return first, value

    def integer(self, what: str, keys: Sequence[str], least: int = 1) -> int:
        key, value = self.find(what, keys)
        return self.checked(what, key, value, least)

    def optional(self, what: str, key: str, default: int, least: int = 0) -> int:
        """An integer that the model's own config class gives a default."""
        value = self.get(key)
        return default if value is None else self.checked(what, key, value, least)

    def checked(self, what: str, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(what, f"{key}: got {value!r}, want an integer of at least {least}")
        return value

    def each(self, what: str, keys: Sequence[str], layers: Sequence[int], total: int, least: int) -> tuple[int, ...]:
        """One integer for each of `layers`.

        Read, in this order, from per_layer_config (keyed by the layer's index), from a list with one entry for each
        of the model's `total` layers, or from one number for all of them.
        """
        found = []
        for layer in layers:
            own = self.at(layer, only=True)
            scope = own if any(own.get(key) is not None for key in keys) else self
            key, value = scope.find(what, keys)
            if isinstance(value, list | tuple):
                if len(value) != total:
                    raise scope.error(what, f"{key} has {len(value)} entries for {total} layers; give one for each")
                value = value[layer]
            found.append(scope.checked(what, key, value, least))
        return tuple(found)


def _agree(value: Any, other: Any) -> bool:
    """Equal, a list of one repeated number and that number included."""
    if isinstance(value, list | tuple) != isinstance(other, list | tuple):
        many, one = (value, other) if isinstance(value, list | tuple) else (other, value)
        return bool(many) and all(entry == one for entry in many)
    return bool(value == other)


def plain(config: Any) -> Mapping[str, Any]:
    """A config as nested plain data: a mapping as it is, an object by its `to_dict`, else by its attributes."""
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        converted: Mapping[str, Any] = config.to_dict()
        return converted
    if hasattr(config, "__dict__"):
        return {key: value for key, value in vars(config).items() if not key.startswith("_")}
    raise ConfigError(f"config: got {type(config).__name__}, want a transformers config or its dict; pass the config")


def levels(
    values: Mapping[str, Any], children: Sequence[str], path: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config's levels, each with its path: what lies under `children` (in their order), then the level itself."""
    for key in children:
        child = values.get(key)
        if child is not None and not isinstance(child, str | int | list | tuple):
            yield from levels(plain(child), children, f"{path}.{key}".lstrip("."))
    yield path, values
