"""Cases of `capture_shape`: the sizes that both sides of a capturer take from a config, and what they must refuse.

A recipe holds `class` and `keys`, or `keys` alone, as those of `describe`; `want` of a capture shape.
"""

from __future__ import annotations

from typing import Any, Literal

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.configs import Keys
from moe_conformance.model.families.describe import capture_shape, describe
from moe_conformance.model.families.families import BY_SLUG
from moe_conformance.model.families.record import Record
from moe_conformance.suites.describe.cases import LLAMA
from moe_conformance.suites.describe.families import flat_keys, further, nested

SIDES: tuple[Literal["worker", "reader"], ...] = ("worker", "reader")


# The number of experts says which dtype the ids need.
COUNTED = "no published model has ids of identity experts that need a wider dtype than those of its other experts"


def captured(record: Record, name: str) -> Case:
    """name: of the config, as in `Record.captured`."""
    config_class, keys = record.config_class, flat_keys(record)
    if name == "nested":
        config_class, keys = record.wrapper.config_class if record.wrapper else "", nested(record, keys)
    elif name:
        config_class, keys = further(record, next(config for config in record.configs if config.name == name))
    said = {"model_type": record.model_type, **flat_keys(record)} if name in ("", "nested") else keys
    if "model_type" not in said:
        said = {"model_type": record.model_type, **said}
    spec = describe(said)
    layers, top_k, experts = capture_shape(said)
    want = {
        "layers": layers,
        "moe_layers": sum(layer in spec.moe_layers for layer in spec.runs),
        "top_k": top_k,
        "experts": experts,
    }
    recipe: dict[str, Any] = {"keys": keys, "want": want} | ({"class": config_class} if config_class else {})
    slug = f"{record.slug}-{name}" if name else record.slug
    tier = "smoke" if record.sample == "smoke" and name == "hub" else "core"
    lenient = COUNTED if record.sizes.extra_experts else ""
    return Case(f"capture-shape-{slug}", "capture_shape", "capture-shape.both-sides", recipe, tier, lenient)


CAPTURED = tuple(captured(record, name) for record in BY_SLUG.values() for name in record.captured)


def refused(name: str, clause: str, keys: Keys, config_class: str) -> Case:
    # The names of what is missing are asked of the resolver; a capturer need only refuse on purpose.
    recipe = {"keys": keys, "names": (), "class": config_class}
    return Case(f"capture-shape-{name}", "capture_shape", clause, recipe)


# The seed's own config, without the key that the capturer knew by another name; and a model without experts.
REFUSED = (
    *(
        refused(
            f"{record.slug}-without-top-k",
            "config.say-what-is-missing",
            {**flat_keys(record), "top_k_experts": None},
            record.config_class,
        )
        for record in BY_SLUG.values()
        if record.sample and "top_k_experts" in record.config
    ),
    refused("llama-dense", "config.refuse-dense", LLAMA, "LlamaConfig"),
)

CASES = CAPTURED + REFUSED
