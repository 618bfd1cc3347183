"""The configs of each family, from its record, in the spelling of the hub."""

from __future__ import annotations

from typing import Any

from moe_conformance.model.families.configs import MODEL, TO_READ, UNPUBLISHED, Keys, filled
from moe_conformance.model.families.record import Config, Record


def flat_keys(record: Record) -> dict[str, Any]:
    """The keyword arguments of the record's config class."""
    found: dict[str, Any] = filled({**record.beside, **record.config}, TO_READ)
    return found


def nested(record: Record, level: Keys) -> dict[str, Any]:
    """The keyword arguments of the wrapper's config class, around the level that describes the experts."""
    wrapper = record.wrapper
    if wrapper is None:
        raise ValueError(f"record of {record.model_type}: got no wrapper, want one; a nested config needs it")
    found = {**level, **({"model_type": record.model_type} if wrapper.typed else {})}
    for name in reversed(wrapper.path):
        found = {name: found}
    return {**found, **filled(wrapper.rest, TO_READ)}


def is_published(record: Record, way: Keys) -> bool:
    """Whether this way says nothing that no published config says."""
    return not way.keys() & UNPUBLISHED and not any(way.get(key) for key in record.disputed)


def layer_keys(record: Record, way: Keys, published: bool = False) -> dict[str, Any]:
    """The record's config with the method keys of one way, or only with those that published configs set."""
    keys = flat_keys(record)
    more = {key: value for key, value in way.items() if not published or is_published(record, {key: value})}
    below = record.sizes.experts_under
    return {**keys, below: {**keys[below], **more}} if below else {**keys, **more}


def further(record: Record, config: Config) -> tuple[str, dict[str, Any]]:
    """The config class ("" for a plain config.json) and the keys of a further config of a record."""
    own = {key: size for key, size in flat_keys(record).items() if key not in config.dropped}
    kept = {key: size for key, size in own.items() if not config.bare or key in MODEL}
    level: dict[str, Any] = {**kept, **config.keys}
    if config.form == "class":
        return record.config_class, level
    if config.form == "nested":
        return record.wrapper.config_class if record.wrapper else "", nested(record, level)
    if not config.untyped:
        level = {"model_type": record.model_type, **level}
    if config.model_type:
        return "", {"model_type": config.model_type, config.below or "text_config": level, **config.top}
    return "", level
