"""How a model of a config.json writes and reads the tensors of its MoE layers. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_conformance.errors import ConfigError
from moe_conformance.model.families.families import NESTED, NESTED_LAST, RECORDS, Families
from moe_conformance.model.families.naming import Names
from moe_conformance.model.families.record import Record
from moe_conformance.model.families.scope import Scope, levels, model_type_of, plain
from moe_conformance.quote import plainly

NAMED: Mapping[str, Names] = {name: record.names for name, record in RECORDS.items() if record.names is not None}
# Every prefix that is read; whatever stands under another is no part of the language model.
READ_PREFIXES = tuple(
    sorted(
        {"", "model.", "language_model."}
        | {prefix for names in NAMED.values() for prefix in (names.prefix, *names.prefixes.values())}
    )
)


def family_of(config: Mapping[str, Any], families: Families = RECORDS) -> tuple[Record, Scope]:
    """The record of a config.json whose checkpoint names are known, and the level that describes the experts."""
    root = model_type_of(plain(config))
    for path, level in [*levels(config, NESTED), *levels(config, NESTED_LAST)]:
        own = model_type_of(level) or root
        record = families.record_of(own)
        if record is not None and record.names is not None:
            return record, Scope(level, path, root or own)
    raise ConfigError(
        f"model_type: got {plainly(root) or 'none'}, whose checkpoint names are not known, "
        f"want one of {', '.join(NAMED)}"
    )


def names_of(config: Mapping[str, Any], families: Families = RECORDS) -> Names:
    """How a model of this config.json writes its tensors."""
    model_type = model_type_of(plain(config))
    record, _ = family_of(config, families)
    found = record.names
    assert found is not None  # as family_of says
    if found.alone_as_modules and model_type == record.model_type:
        renamed = {piece.target for piece in found.read}
        kept = tuple(piece for piece in found.written if piece.target not in renamed)
        found = replace(found, written=found.read + kept, read=found.written)
    return replace(found, prefix=found.prefixes.get(model_type, found.prefix))
