"""Checkpoint names of any family's MoE layers, in every spelling that its record has, to canonical names.

layers.I.experts.E.gate_proj|up_proj|down_proj.SUFFIX     of one expert, or for a packed tensor of each
layers.I.NAME                                             of whatever else `LayerSpec.tensors` names
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_conformance.engine import CheckpointName
from moe_conformance.errors import CheckpointError
from moe_conformance.quote import quoted
from moe_conformance.reference_impl.checkpoint.places import Place, Places

# That one call gives. The largest published checkpoint has 61 layers of 384 experts with three matrices, each of at
# most four tensors: 281,088.
MOST_NAMES = 2**20
# What the experts' tensors are made of, in the order of their rows.
PARTS = {"w13": ("gate_proj", "up_proj"), "w1": ("up_proj",), "w2": ("down_proj",)}
BIASES = {"b13": "w13", "b1": "w1", "b2": "w2"}
# Layouts in which the experts are not the first dim.
NOT_BY_EXPERT = frozenset({"stacked", "padded"})


def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
    """Canonical names for each checkpoint name of a model with this config.

    config: a config.json. A name outside the MoE layers, or canonical already, is returned unchanged. Raises
    ConfigError for a config that is not of a known MoE model, and CheckpointError for a name within an MoE layer that
    is none of the family's, and for a packed tensor whose shape says another number of experts.
    """
    places = Places(config)
    found: dict[str, tuple[str, ...]] = {}
    total = 0
    for entry in names:
        located = [] if entry.name in places.wanted else places.locate(entry.name)
        for place in located:
            _check(entry, place, places)
        total += sum(_count(place, places) for place in located) or 1
        if total > MOST_NAMES:
            raise CheckpointError(
                f"names: got {len(names)} that stand for more than {MOST_NAMES} canonical ones, want fewer; "
                "config.json and the tensors are of different models"
            )
        targets = tuple(name for place in located for name in _targets(place, places))
        found[entry.name] = targets or (entry.name,)
    return found


def _check(entry: CheckpointName, place: Place, places: Places) -> None:
    experts = places.sizes[place.tensor].experts
    is_packed = _parts(place) is not None and place.expert is None and not NOT_BY_EXPERT & set(place.piece.ops)
    if is_packed and entry.shape and entry.shape[0] != experts:
        raise CheckpointError(
            f"{quoted(entry.name)}: got shape {quoted(list(entry.shape))}, want {experts} experts first as config.json "
            "says; config.json and the tensors are of different models"
        )


def _parts(place: Place) -> tuple[str, ...] | None:
    """Those of each expert that the place is of, None for what is not of experts."""
    owner, _, name = place.tensor.rpartition(".")
    parts = PARTS.get(BIASES.get(name, name)) if owner.endswith(".experts") else None
    return parts if parts is None or place.piece.half is None else (parts[place.piece.half],)


def _count(place: Place, places: Places) -> int:
    parts = _parts(place)
    experts = places.sizes[place.tensor].experts if place.expert is None else 1
    return 1 if parts is None else experts * len(parts)


def _targets(place: Place, places: Places) -> Iterator[str]:
    parts = _parts(place)
    owner, _, name = place.tensor.rpartition(".")
    if parts is None:
        yield place.tensor if place.suffix == "weight" else f"{place.tensor}.{place.suffix}"
        return
    suffix = "bias" if name in BIASES else place.suffix
    for expert in range(places.sizes[place.tensor].experts) if place.expert is None else (place.expert,):
        yield from (f"{owner}.{expert}.{part}.{suffix}" for part in parts)
