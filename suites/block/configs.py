"""The small adverse configs whose blocks are judged, from each family's record, with every knob turned.

No two roles share a size, none is a power of two where it may be otherwise, and no scale, norm, clamp or cap is at a
value that does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from moe_conformance.model.families.configs import TO_COMPUTE, filled
from moe_conformance.model.families.describe import describe
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.record import Block, Record, Variant
from moe_conformance.model.specs import LayerSpec


@dataclass(frozen=True)
class Family:
    """The config of a block in full, and what its record says of the block. lenient: why it breaks a SHOULD alone."""

    record: Record
    config: dict[str, Any]
    block: Block
    lenient: str = ""


def plain(record: Record, block: Block) -> Family:
    keys = {"model_type": record.model_type, **filled({**record.beside, **record.config, **block.keys}, TO_COMPUTE)}
    return Family(record, keys, block)


def varied(family: Family, variant: Variant) -> Family:
    """The same with another setting."""
    changed = {
        item.name: value
        for item in fields(Variant)
        if item.name not in ("keys", "dropped", "lenient") and (value := getattr(variant, item.name)) is not None
    }
    kept = {key: value for key, value in family.config.items() if key not in variant.dropped}
    return Family(family.record, {**kept, **variant.keys}, replace(family.block, **changed), variant.lenient)


# By slug, and by slug and setting.
FAMILIES: dict[str, Family] = {
    record.slug: plain(record, record.block) for record in RECORDS.values() if record.block is not None
}
OTHERS: dict[str, Family] = {
    f"{slug}-{name}": varied(family, variant)
    for slug, family in FAMILIES.items()
    for name, variant in family.record.variants.items()
}
VARIANTS: dict[str, Family] = FAMILIES | OTHERS


@cache
def spec_of(slug: str) -> LayerSpec:
    """The layer of the block that is judged."""
    family = VARIANTS[slug]
    found = describe(family.config)
    return found.layers[(found.moe_layers or found.encoder_moe_layers).index(family.block.layer)]
