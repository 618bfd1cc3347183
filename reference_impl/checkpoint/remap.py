"""Checkpoint names of Gemma 4 experts and routers, in every published naming style, to canonical names.

Styles, after a prefix `model.`, `model.language_model.`, `language_model.model.` or none:

    layers.I.experts.E.gate_proj.weight          one tensor an expert (quantised checkpoints)
    layers.I.moe.experts.E.gate_proj.weight      the same, from exporters that name the block `moe`
    layers.I.experts.gate_up_proj                all experts packed in three dimensions (the hub's own)
    layers.I.moe.gate_up_proj                    the same, before the block lost its name
    layers.I.moe.experts.gate_up_proj            the same, prefixed by a converter
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_conformance.engine import CheckpointName, MoESpec
from moe_conformance.errors import CheckpointError
from moe_conformance.quote import few, quoted

# Unquantised, FP8 and ModelOpt NVFP4, compressed-tensors, GPTQ and AWQ.
SUFFIXES = (
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "input_scale",
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
# What each part of a packed tensor is, in the order of its rows.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
ROUTER = {"router.proj.weight": "proj", "router.scale": "scale", "router.per_expert_scale": "per_expert_scale"}

_PREFIX = r"(?:model\.language_model\.|language_model\.model\.|model\.)?"
_BLOCK = re.compile(_PREFIX + r"layers\.([0-9]+)\.((?:experts|moe|router)(?:\..*)?)", re.DOTALL)
# At most six digits: a longer number is not an index but an attack on int().
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_SUFFIX = "(?:[.](" + "|".join(SUFFIXES) + "))?"
_ONE_EXPERT = re.compile(r"(?:moe[.])?experts[.]([0-9]+)[.](gate_proj|up_proj|down_proj)" + _SUFFIX)
_PACKED = re.compile(r"(?:moe|experts|moe[.]experts)[.](gate_up_proj|down_proj)" + _SUFFIX)


# That one call gives. The largest published checkpoint has 61 layers of 384 experts with three matrices, each of at
# most four tensors: 281,088.
MOST_NAMES = 2**20


class Place(NamedTuple):
    """Where a checkpoint tensor belongs.

    part: "gate_proj", "up_proj", "down_proj", "gate_up_proj", or "proj", "scale", "per_expert_scale" of a router.
    expert: None for a router and for a packed tensor, which holds every expert. suffix: "" for a router.
    """

    layer: int
    part: str
    expert: int | None
    suffix: str

    @property
    def is_router(self) -> bool:
        return not self.suffix


def parse(name: str) -> Place | None:
    """Read one checkpoint name.

    returns None for a name outside the MoE block (attention, a dense MLP, `layers.0.experts_norm`, `mlp.experts` of
    another model, a vision tower). A name inside the block that is none of the styles raises CheckpointError: to skip
    it would leave a parameter unwritten.

        parse("model.layers.10.moe.experts.3.up_proj.g_idx") == Place(10, "up_proj", 3, "g_idx")
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        return None
    layer, rest = index_of(name, "layer", block[1]), block[2]
    if one := _ONE_EXPERT.fullmatch(rest):
        return Place(layer, one[2], index_of(name, "expert", one[1]), one[3] or "weight")
    if packed := _PACKED.fullmatch(rest):
        return Place(layer, packed[1], None, packed[2] or "weight")
    # The scale sat in the block before it moved to the router; canonical names carry no ".weight".
    rest = {"moe.per_expert_scale": "router.per_expert_scale", "router.proj": "router.proj.weight"}.get(rest, rest)
    if rest in ROUTER:
        return Place(layer, ROUTER[rest], None, "")
    raise CheckpointError(
        f"{quoted(name)}: got {quoted(rest)} in the MoE block, want experts.E.gate_proj|up_proj|down_proj.SUFFIX, "
        f"experts.gate_up_proj|down_proj, {', '.join(ROUTER)}, with SUFFIX one of {', '.join(SUFFIXES)}; "
        "rename the tensor or remove it from the checkpoint"
    )


def index_of(name: str, what: str, digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        raise CheckpointError(
            f"{quoted(name)}: got {what} {digits[:20]!r}, want a number without leading zeros and of at most six "
            "digits; rename the tensor"
        )
    return int(digits)


def targets(place: Place, num_experts: int) -> tuple[str, ...]:
    """The canonical names of a place: one, or for a packed tensor one for each expert and part.

    layers.I.experts.E.PART.SUFFIX, with gate_proj before up_proj; layers.I.router.PART.
    """
    if place.is_router:
        return (f"layers.{place.layer}.router.{place.part}",)
    parts = PARTS[place.part] if place.expert is None else (place.part,)
    experts = range(num_experts) if place.expert is None else (place.expert,)
    return tuple(f"layers.{place.layer}.experts.{e}.{part}.{place.suffix}" for e in experts for part in parts)


def experts_by_layer(spec: MoESpec) -> Mapping[int, int]:
    """The number of experts of each MoE layer."""
    counts = spec.num_experts
    counts = (counts,) * len(spec.moe_layers) if isinstance(counts, int) else counts
    return dict(zip(spec.moe_layers, counts, strict=True))


def experts_of(experts: Mapping[int, int], name: str, place: Place) -> int:
    """The number of experts of the place's layer; CheckpointError if the model has no such layer or expert."""
    count = experts.get(place.layer)
    if count is None:
        raise CheckpointError(
            f"{quoted(name)}: got layer {place.layer}, want one of the config's MoE layers {few(experts)}; "
            "config.json and the tensors are of different models"
        )
    if place.expert is not None and place.expert >= count:
        raise CheckpointError(
            f"{quoted(name)}: got expert {place.expert}, want 0 to {count - 1} as config.json says; "
            "config.json and the tensors are of different models"
        )
    return count


def remap_name(experts: Mapping[int, int], name: str, shape: Sequence[int] = ()) -> tuple[str, ...]:
    """Canonical names of one tensor; a name outside the MoE block, or canonical already, is returned unchanged.

    experts: of each MoE layer. shape: checked against their number where the tensor is packed; () if not known.
    """
    place = parse(name)
    if place is None:
        return (name,)
    count = experts_of(experts, name, place)
    if place.part in PARTS and place.expert is None and shape and shape[0] != count:
        raise CheckpointError(
            f"{quoted(name)}: got shape {quoted(list(shape))}, want {count} experts first as config.json says; "
            "config.json and the tensors are of different models"
        )
    return targets(place, count)


def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
    """Canonical names for each checkpoint name of a model with this config (see `remap_name`).

    config: as for `describe`. Raises CheckpointError for a name of the MoE block that is none of the styles.
    """
    from moe_conformance.model.families.describe import describe

    experts = experts_by_layer(describe(config))
    found: dict[str, tuple[str, ...]] = {}
    total = 0
    for entry in names:
        found[entry.name] = remap_name(experts, entry.name, entry.shape)
        total += len(found[entry.name])
        if total > MOST_NAMES:
            raise CheckpointError(
                f"names: got {len(names)} that stand for more than {MOST_NAMES} canonical ones, want fewer; "
                "config.json and the tensors are of different models"
            )
    return found
