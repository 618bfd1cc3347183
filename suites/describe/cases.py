"""Cases of `describe`: every config class, every spelling, and what must be refused.

A recipe holds `class` and `keys` (the config class of transformers is built from them), or `keys` alone (they are a
plain config.json), and `names` that the message of a refusal must have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.configs import MODEL, TO_COMPUTE, TO_READ, Keys, filled
from moe_conformance.model.families.families import BY_SLUG
from moe_conformance.model.families.record import Record
from moe_conformance.suites.describe.families import flat_keys, further, is_published, layer_keys, nested

SMOKE = {
    "config-gemma4-hub",  # plain: its config class imports a second of transformers
    "config-gemma4-hub-without-top-k",
    "config-llama-dense-hub",
    "config-qwen3-moe",
    "config-nemotron-h",
    "config-hunyuan-v1-moe-top-k-list",
    "config-layers-deepseek-v3",
    "config-layers-deepseek-v3-published",
    "config-layers-step3p7",
    "config-layers-step3p7-published",
}
# What a model library builds, with values of the config class in place of what is missing: it offers no refusals.
CLAUSES = {
    "sizes": "describe.resolve",
    "layers": "describe.layers",
    "refused": "config.say-what-is-missing",
    "dense": "config.refuse-dense",
}
UNUSUAL = "no published config has this activation, bias or jitter"
WAYS = ("", "-otherwise", "-third")


def case(kind: str, name: str, keys: Keys, config_class: str = "", lenient: str = "", **recipe: Any) -> Case:
    case_id = f"config-layers-{name}" if kind == "layers" else f"config-{name}"
    found: dict[str, Any] = {"keys": keys, **recipe} | ({"class": config_class} if config_class else {})
    return Case(case_id, "describe", CLAUSES[kind], found, "smoke" if case_id in SMOKE else "core", lenient)


def of(record: Record) -> Iterator[tuple[str, Case]]:
    """The cases of one family, each with its kind."""
    slug, keys = record.slug, flat_keys(record)
    yield "sizes", case("sizes", slug, keys, record.config_class)
    if record.wrapper:
        yield "sizes", case("sizes", f"{slug}-nested", nested(record, keys), record.wrapper.config_class)
    for config in record.configs:
        config_class, said = further(record, config)
        names: tuple[str, ...] = config.names
        if config.kind == "dense":
            names = (record.model_type.removesuffix("_text"),)
        named = {"names": names} if config.kind in ("refused", "dense") else {}
        name = f"{slug}-{config.name}"
        yield config.kind, case(config.kind, name, said, config_class, config.lenient, **named)
    for way, tail in zip(record.ways, WAYS, strict=False):
        # A way with keys that no published config sets is a SHOULD, and without them a case of its own.
        usual = is_published(record, way)
        name = f"{slug}{tail}"
        yield "layers", case("layers", name, layer_keys(record, way), record.config_class, "" if usual else UNUSUAL)
        if not usual:
            said = layer_keys(record, way, published=True)
            yield "layers", case("layers", f"{name}-published", said, record.config_class)


def as_block(record: Record) -> Keys:
    """The config of the family's block."""
    found: Keys = filled({**record.beside, **record.config, **(record.block.keys if record.block else {})}, TO_COMPUTE)
    return found


# A model without experts, of a family that has none.
LLAMA: Keys = filled(MODEL, TO_READ) | {"intermediate_size": 24}
OF_NO_FAMILY = (
    ("dense", case("dense", "llama-dense", LLAMA, "LlamaConfig", names=("llama",))),
    ("dense", case("dense", "llama-dense-hub", {"model_type": "llama", **LLAMA}, names=("llama",))),
)
_ALL = (*(found for record in BY_SLUG.values() for found in of(record)), *OF_NO_FAMILY)
# Two configs of one model type, of which an engine that remembers one gives the other's answer.
TWICE = tuple(
    case("sizes", f"{record.slug}-again", {"model_type": record.model_type, **flat_keys(record)}, other=other)
    for record in BY_SLUG.values()
    if record.sample == "smoke"
    for other in (
        {"model_type": record.model_type, **filled({**record.beside, **record.config}, TO_COMPUTE), **as_block(record)},
    )
)
DESCRIBED, LAYERED, REFUSED, DENSE = (
    tuple(found for kind, found in _ALL if kind == wanted) for wanted in ("sizes", "layers", "refused", "dense")
)
# A wrapper whose class has no model type: saved, it does not say what it is.
SAVED = tuple(
    found for found in DESCRIBED + LAYERED if found.recipe.get("class") not in (None, "Qwen3OmniMoeTalkerConfig")
)
CASES = DESCRIBED + TWICE + LAYERED + REFUSED + DENSE
