"""How a model of a config.json writes and reads the tensors of its MoE layers. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from moe_conformance.errors import ConfigError, UnknownFamilyError
from moe_conformance.model.families.describe import find
from moe_conformance.model.families.families import NESTED, NESTED_LAST, RECORDS, Families
from moe_conformance.model.families.naming import Names
from moe_conformance.model.families.record import Record
from moe_conformance.model.families.scope import Scope, levels, model_type_of, plain
from moe_conformance.model.families.unknown import like
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
    """The record whose names the checkpoint of a config.json has, and the level that describes the experts.

    A model type without a record has the names of the families that its keys are of, where these leave no doubt.
    """
    root = model_type_of(plain(config))
    for path, level in [*levels(config, NESTED), *levels(config, NESTED_LAST)]:
        own = model_type_of(level) or root
        record = families.record_of(own)
        if record is not None and record.names is not None:
            return record, Scope(level, path, root or own)
        if record is not None:
            raise _unknown(root, f"{record.model_type} among them: {record.method.unsaid}")
    try:
        scope, _, spec = find(config, families)
        alike = [record for record in like(scope, spec) if record.names is not None]
    except ConfigError as error:
        raise _unknown(root, str(error)) from error
    if not alike or any(record.names != alike[0].names for record in alike):
        names = ", ".join(record.model_type for record in alike)
        raise _unknown(root, f"by its keys it may be any of {names}, whose checkpoints name tensors otherwise")
    return alike[0], scope


def _unknown(model_type: str, why: str) -> UnknownFamilyError:
    nearest = ", ".join(get_close_matches(model_type, NAMED, n=3, cutoff=0.5))
    return UnknownFamilyError(
        f"model_type: got {plainly(model_type) or 'none'}, whose checkpoint names are not known ({why}); set it to "
        f"that of a family that is laid out alike{f', as {nearest} may be' if nearest else ''}"
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
