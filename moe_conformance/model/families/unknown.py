"""What the layers of an unknown model type compute, if its keys leave no doubt.

The candidates for such a config are the families that have all method keys of the config, and whose own method keys are
all in the config. Keys of sizes, and keys that models without experts have too, do not distinguish families. If all
candidates give the same layers, these are the config's. If two differ, in the layers or in a size, or there is no
candidate, the layers are left open. Softmax, for example, needs no key in many families, renormalised or not, and the
keys of DeepSeek-V3 are also those of Mistral 4, which scores by softmax.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from moe_conformance.errors import ConfigError
from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.families import EXPERTS, RECORDS
from moe_conformance.model.families.keys import WHAT
from moe_conformance.model.families.layer_spec import layer_specs
from moe_conformance.model.families.record import SHARED_COUNT, TOP_K, Record
from moe_conformance.model.families.scope import Scope
from moe_conformance.model.families.sizes import sizes_of
from moe_conformance.model.specs import LayerSpec

SIZES = frozenset({*EXPERTS, *TOP_K, *SHARED_COUNT, "decoder_sparse_step", "mlp_only_layers", "vocab_size"})
ACTIVATIONS = frozenset({"activation_function", "dense_act_fn", "hidden_act", "hidden_activation", "mlp_hidden_act"})
ORDINARY = SIZES | ACTIVATIONS | {"mlp_bias", "use_bias", "rms_norm_eps"}


def layers_by_keys(scope: Scope, spec: MoESpec) -> tuple[LayerSpec, ...]:
    """The layers, or ConfigError with the keys that were seen and the families that have them. spec: the sizes."""
    return layer_specs(scope, like(scope, spec)[0], spec)


def like(scope: Scope, spec: MoESpec) -> tuple[Record, ...]:
    """The records that the config may be of, which say the same of its layers; ConfigError where they do not.

    spec: the sizes as read by the keys.
    """
    seen = {name for record in RECORDS.values() for name in _names(record) if name in scope.values}
    candidates = [record for record in RECORDS.values() if _has_just(record, seen) and _says(record, scope)]
    said = dict(_said(scope, spec, candidates))
    layers, *others = said.values() or (None,)
    if layers is not None and all(other == layers for other in others):
        return tuple(RECORDS[name] for name in said)
    names = sorted(said or (record.model_type for record in candidates))
    raise scope.error(
        WHAT,
        f"unknown model type, keys: {', '.join(sorted(seen)) or 'none'}; families with these keys: "
        f"{', '.join(names) or 'none'}; set model_type to one that computes the same",
    )


def _names(record: Record) -> set[str]:
    """All keys that identify a family, including those that its configs carry and nothing reads."""
    return {*chain.from_iterable(record.method_keys), *record.dead, *record.beside} - ORDINARY


def _has_just(record: Record, seen: set[str]) -> bool:
    """All keys that decide the family's method are seen, under one of their names, and none that it does not have."""
    deciding = [names for names in record.method_keys if not ORDINARY & set(names)]
    return seen <= _names(record) and all(seen & set(names) for names in deciding)


def _says(record: Record, scope: Scope) -> bool:
    """Whether keys that the family's configs carry and nothing reads have the same values here, if present."""
    read = {name for names in record.method_keys for name in names}
    return all(scope.values.get(key, value) == value for key, value in record.beside.items() if key not in read)


def _said(
    scope: Scope, spec: MoESpec, families: Iterable[Record]
) -> Iterator[tuple[str, tuple[LayerSpec, ...] | None]]:
    """The layers as each family says, None where a size is not as it says; without those that do not know a value."""
    for record in families:
        try:
            layers = layer_specs(scope, record, spec)
        except ConfigError:
            continue
        yield record.model_type, layers if _agrees(scope, record, spec) else None


def _agrees(scope: Scope, record: Record, spec: MoESpec) -> bool:
    try:
        return sizes_of(scope, record.sizes) == spec
    except ConfigError:
        return False
