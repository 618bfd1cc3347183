"""From what a layer computes back to a config that says so, using a family's record in reverse.

For engines whose layers can be built only from configs. The result is read back by `layer_of`: a config is returned
only if its record yields exactly the spec asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import Any, NamedTuple

from moe_conformance.errors import MoEConformanceError
from moe_conformance.model.families.configs import TO_COMPUTE, Keys, Size, filled
from moe_conformance.model.families.describe import layer_of
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.record import Method, Record
from moe_conformance.model.specs import LayerSpec, MLPSpec, RoutingSpec

# Parts of a record's method -> the part of LayerSpec whose fields they decide.
_PARTS = {
    "routing": "routing",
    "logits": "logits",
    "experts": "experts",
    "shared": "shared",
    "shared_mlp": "shared.mlp",
    "latent": "latent",
    "dense": "dense",
    "dense_mlp": "dense.mlp",
    "layer": "",
}
_ALWAYS_READ = (
    *(f"routing.{name}" for name in ("score", "selector", "select_on", "renormalize", "scale", "logit_scale")),
    *(f"experts.{name}" for name in ("activation", "gated", "clamp", "alpha", "bias", "weight_on")),
)
# The value of a key that stays as the setting has it.
_AS_IT_IS = object()
# Sizes that a config may leave open -> the LayerSpec field of each.
_OPEN = {
    Size.HIDDEN: "hidden_size",
    Size.EXPERTS: "num_experts",
    Size.TOP_K: "routing.top_k",
    Size.WIDTH: "experts.width",
    Size.DENSE: "dense.mlp.width",
    Size.SHARED: "shared.mlp.width",
    Size.LATENT: "latent.width",
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A family with its switches in one position: keys of a small config with open sizes, and one of its MoE layers.

    spec: what that layer computes at the sizes of TO_COMPUTE. decided: fields, dotted below LayerSpec, that other
    values of its keys may decide otherwise.
    """

    record: Record
    keys: Keys
    layer: int
    spec: LayerSpec
    decided: frozenset[str]


@cache
def settings(model_type: str) -> tuple[Setting, ...]:
    """The settings of a family whose blocks are judged; none if its record cannot express its layers."""
    record = RECORDS[model_type]
    block = record.block
    if block is None or record.method.unsaid:
        return ()
    plain: Keys = {"model_type": record.model_type, **record.config, **block.keys}
    others = [
        ({key: value for key, value in plain.items() if key not in variant.dropped} | variant.keys, variant.layer)
        for variant in record.variants.values()
    ]
    found: list[Setting] = []
    for keys, layer in [(plain, None), *others]:
        keys = _with_open_sizes(keys, record.config)
        at = block.layer if layer is None else layer
        spec = layer_of(filled(keys, TO_COMPUTE), at)
        if all(spec != setting.spec for setting in found):
            found.append(Setting(record, keys, at, spec, _decided(record, spec, set(_sizes_in(keys)))))
    return tuple(found)


class Said(NamedTuple):
    """A config.json, and what its family's record says that the setting's layer of it computes."""

    config: Keys
    spec: LayerSpec


def config_of(setting: Setting, spec: LayerSpec, fits: Callable[[LayerSpec], bool]) -> Said | None:
    """A config of the setting's family that says the spec, as far as its keys can.

    fits: whether the record's reading of a config is what was asked for; None if no value of its keys can give that.
    """
    base = filled(setting.keys, {**TO_COMPUTE, **_sizes(setting.record, spec)})
    choices = _choices(setting, spec)
    for values in product(*choices.values()):
        config = _set(base, setting.record.sizes.experts_under, dict(zip(choices, values, strict=True)))
        try:
            found = layer_of(config, setting.layer)
        except (MoEConformanceError, ValueError):  # the family gives this value no meaning
            continue
        if fits(found):
            return Said(config, found)
    return None


def expressed(
    setting: Setting,
    spec: LayerSpec,
    parts: Collection[str],
    narrow: bool,
    alike: Callable[[LayerSpec, LayerSpec], LayerSpec] = lambda found, _: found,
) -> tuple[LayerSpec, Said] | None:
    """The family's layer with the values of this spec, and a config that says it; None unless these parts are equal.

    narrow: x is not float32. alike: what is read of a config, with what it may say otherwise as in the layer wanted.
    """
    if is_out_of_reach(setting, spec, parts):
        return None
    wanted = with_values(setting, spec)
    if wanted.routing.selection_bias and not spec.routing.selection_bias:
        spec = replace(spec, routing=replace(spec.routing, selection_bias=True))  # of zeros, as it is initialised
    want = at_rest(spec, narrow)

    def fits(found: LayerSpec) -> bool:
        row = at_rest(alike(found, wanted), narrow)
        return all(getattr(row, part) == getattr(want, part) for part in parts)

    said = config_of(setting, wanted, fits) if fits(wanted) else None
    return None if said is None else (wanted, said)


def small(layer: LayerSpec, routing: RoutingSpec, experts: int, unseen: int, **others: Any) -> LayerSpec:
    """The layer with that routing among that many experts, and other fields; all else is `unseen` wide."""
    # A router of several layers: none but the last is as wide as the logits are.
    sized: dict[str, Any] = {"routing": routing, "num_experts": experts, "hidden_size": unseen, **others}
    sized["experts"] = replace(layer.experts, width=unseen)
    for name in ("shared", "dense"):
        part = getattr(layer, name)
        sized[name] = part and replace(part, mlp=replace(part.mlp, width=unseen))
    sized["latent"] = layer.latent and replace(layer.latent, width=unseen)
    return replace(layer, **sized)


def is_out_of_reach(setting: Setting, spec: LayerSpec, parts: Collection[str]) -> bool:
    """Whether a field of these parts that always acts differs and no key decides it: a quick way to say no."""
    return any(
        path not in setting.decided and _value(setting.spec, path) != _value(spec, path)
        for path in _ALWAYS_READ
        if path.partition(".")[0] in parts
    )


def with_values(setting: Setting, spec: LayerSpec) -> LayerSpec:
    """The family's layer with this spec's values in every field that a config may decide."""
    values = {path: _value(spec, path) for path in setting.decided}
    return with_fields(setting.spec, {path: value for path, value in values.items() if value is not None})


@lru_cache(maxsize=4096)
def at_rest(spec: LayerSpec, narrow: bool) -> LayerSpec:
    """The same layer with every field that has no effect at its default. narrow: x is not float32."""
    return replace(
        spec,
        routing=_routing_at_rest(spec.routing, narrow),
        experts=_mlp_at_rest(spec.experts, narrow),
        shared=spec.shared and replace(spec.shared, mlp=_mlp_at_rest(spec.shared.mlp, narrow), count=1),
        dense=spec.dense and replace(spec.dense, mlp=_mlp_at_rest(spec.dense.mlp, narrow)),
        logits=spec.logits if narrow else replace(spec.logits, dtype="input"),
        combine_dtype=spec.combine_dtype if narrow else "input",
    )


def _routing_at_rest(spec: RoutingSpec, narrow: bool) -> RoutingSpec:
    changes: dict[str, Any] = {}
    if spec.groups == 1:
        changes |= {"top_groups": 1, "group_score": "max", "group_mask": -math.inf}
    if spec.renormalize != "norm":
        changes["norm_order"] = 1.0
    if spec.renormalize == "no":
        changes |= {"epsilon": 0.0, "floor": 0.0}
    elif spec.score == "softmax" and not spec.selection_bias and spec.epsilon <= 1e-20:
        # K scores of the best groups sum to 1 / E or more, and that plus 1e-20 is the same float32.
        changes["epsilon"] = 0.0
    if not narrow:
        changes["score_dtype"] = "float32"
    return replace(spec, **changes)


def _mlp_at_rest(spec: MLPSpec, narrow: bool) -> MLPSpec:
    changes: dict[str, Any] = {} if spec.clamp != "no" else {"limit": math.inf, "up_limit": 0.0}
    if not narrow:
        changes["dtype"] = "input"
    return replace(spec, **changes)


def _with_open_sizes(keys: Keys, own: Mapping[str, Any]) -> Keys:
    """The keys, with those numbers left open that the record's config leaves open, unless the key is switched off."""
    found = dict(keys)
    for key, value in own.items():
        if isinstance(value, Mapping):
            found[key] = _with_open_sizes(found.get(key, {}), value)
        elif isinstance(value, Size) and value in (*_OPEN, Size.HEADS) and found.get(key, 0) is not None:
            found[key] = value
    return found


def _sizes_in(value: Any) -> Iterator[Size]:
    if isinstance(value, Size):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _sizes_in(entry)


def _sizes(record: Record, spec: LayerSpec) -> dict[Size, int | None]:
    found: dict[Size, int | None] = {
        # Of 8 where that can be: the sections of ERNIE-VL's rotary embedding fit no wider ones.
        Size.HEADS: spec.hidden_size // 8 if spec.hidden_size % 8 == 0 else 1,
        Size.HIDDEN: spec.hidden_size,
        Size.EXPERTS: spec.num_experts,
        Size.TOP_K: spec.routing.top_k,
        Size.WIDTH: spec.experts.width,
    }
    if record.sizes.latent:
        found[Size.LATENT] = spec.latent.width if spec.latent else None
    if spec.shared:
        found[Size.SHARED] = spec.shared.mlp.width
    if spec.dense:
        found[Size.DENSE] = spec.dense.mlp.width
    return found


def _decided(record: Record, spec: LayerSpec, open_sizes: Collection[Size]) -> frozenset[str]:
    """Every field that a key decides, directly or through a function, and every open size."""
    found = {path for size, path in _OPEN.items() if size in open_sizes}
    found |= {"vocab_size"} if spec.vocab_size else set()
    found |= {"routing.identity_experts"} if record.sizes.extra_experts else set()
    found |= {"shared.mlp.width"} if spec.shared else set()  # through the number of them
    for fields_of, prefix in _said(record.method):
        for name, entry in fields_of.items():
            for path, leaf in _leaves(entry, f"{prefix}{name}"):
                if isinstance(leaf, Key) or callable(leaf):
                    found.add(path)
    if spec.shared and "experts.activation" in found:
        found.add("shared.mlp.activation")
    inherited = {path for path in found if path.startswith("experts.")}  # shared experts are as the others are
    own = {f"shared.mlp.{name}" for name in record.method.shared_mlp} | {"shared.mlp.weight_on", "shared.mlp.bias"}
    found |= {f"shared.mlp.{path.removeprefix('experts.')}" for path in inherited if spec.shared} - own
    return frozenset(found)


def _said(method: Method) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The fields of the method, each with the dotted prefix of the spec it belongs to."""
    for name, part in _PARTS.items():
        said, prefix = getattr(method, name), f"{part}." if part else ""
        if isinstance(said, Key):
            assert isinstance(said.of, Mapping)
            for meaning in said.of.values():
                yield meaning, prefix
        elif said is not None:
            yield said, prefix


def _leaves(entry: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(entry, Mapping):
        for name, inner in entry.items():
            yield from _leaves(inner, f"{path}.{name}")
    else:
        yield path, entry


def _choices(setting: Setting, spec: LayerSpec) -> dict[str, list[Any]]:
    """For each key, the values that may express the spec."""
    record, found = setting.record, dict[str, list[Any]]()
    for said in vars(record.method).values():
        if isinstance(said, Key) and isinstance(said.of, Mapping):
            found[_spelled(record, said.names)] = list(said.of)
    for fields_of, prefix in _said(record.method):
        for name, entry in fields_of.items():
            for path, leaf in _leaves(entry, f"{prefix}{name}"):
                value = _value(spec, path)
                if isinstance(leaf, Key) and value is not None:
                    _ask(record, leaf, value, setting, found)
    if record.sizes.extra_experts:
        found[record.sizes.extra_experts[0]] = [spec.routing.identity_experts]
    shared = record.sizes.shared
    if spec.shared and shared and not isinstance(shared.count, int):
        width = spec.experts.width
        many = spec.shared.mlp.width // width if not shared.width and spec.shared.mlp.width % width == 0 else 1
        found.setdefault(_spelled(record, shared.count), [many])
    if spec.vocab_size:
        found["vocab_size"] = [spec.vocab_size]
    return found


def _ask(record: Record, key: Key, value: Any, setting: Setting, found: dict[str, list[Any]]) -> None:
    known = found.setdefault(_spelled(record, key.names), [])
    said = {repr(word) for word in known}
    for word in _words(key, value):
        if key.per_layer and word is not None and word is not _AS_IT_IS:
            word = [word] * TO_COMPUTE[Size.LAYERS]
        if repr(word) not in said:
            known.append(word)
    if isinstance(key.of, Mapping):
        for meaning in key.of.values():
            if isinstance(meaning, Key):
                _ask(record, meaning, value, setting, found)


def _words(key: Key, value: Any) -> list[Any]:
    if key.of is None:
        return [value]
    if isinstance(key.of, Mapping):
        return [word for word, meaning in key.of.items() if isinstance(meaning, Key) or meaning == value]
    return [value, None, _AS_IT_IS]  # a function's result for a number is only known by trying it


def _spelled(record: Record, names: tuple[str, ...]) -> str:
    """The name that the family's own config class uses."""
    used = (record.config, record.block.keys if record.block else {}, *record.ways)
    return next((name for name in names if any(name in keys for keys in used)), names[0])


def _set(config: Keys, under: str, values: Mapping[str, Any]) -> Keys:
    said = {key: value for key, value in values.items() if value is not _AS_IT_IS}
    return {**config, under: {**config[under], **said}} if under else {**config, **said}


def _value(spec: Any, path: str) -> Any:
    """The field of a dotted name; None below a part that the spec does not have."""
    for name in path.split("."):
        spec = getattr(spec, name, None)
    return spec


def with_fields(layer: LayerSpec, values: Mapping[str, Any]) -> LayerSpec:
    """The layer with these values of fields, dotted below LayerSpec."""

    def fill(part: Any, prefix: str) -> Any:
        changes = {}
        for item in fields(part):
            path, value = f"{prefix}{item.name}", getattr(part, item.name)
            if is_dataclass(value):
                changes[item.name] = fill(value, f"{path}.")
            elif path in values:
                changes[item.name] = values[path]
        return replace(part, **changes)

    found: LayerSpec = fill(layer, "")
    return found
