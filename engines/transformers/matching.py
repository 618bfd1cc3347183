"""From a spec to the family of `families` that computes it, and to the config that asks its model type for that.

A family computes a spec if, with the spec's values in the fields that config keys decide, its row is the spec. What is
judged is always the family's own code, and a spec that no row is equal to is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

from moe_conformance.engine import LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.engines.transformers.families import FAMILIES, Family
from moe_conformance.errors import Unsupported

# What a layer is from its logits on.
_PARTS = tuple(item.name for item in fields(LayerSpec) if item.name not in ("logits", "vocab_size"))
# One layer, one head: nothing but the block is run.
_SMALL = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
# Values as configs write them.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
_WORDS: dict[str, dict[Any, Any]] = {
    "renormalize": {"no": False, "sum": True},
    "activation": ACTIVATIONS,
}
# Keys that hold an entry a layer.
_BY_LAYER = ("swiglu_limits",)


@cache
def available() -> tuple[Family, ...]:
    """The rows whose model type the installed transformers has."""
    from moe_conformance.engines.transformers.block import model_types

    return tuple(family for family in FAMILIES if family.model_type in model_types())


Found = tuple[Family, LayerSpec]


def for_layer(spec: LayerSpec, dtype: str) -> Found:
    """A family with that layer, from its logits on; its spec has a shared expert where the model always has one.

    A scale of the sum of what is weighted is one of every weight.
    """
    specs = [spec]
    if spec.output_scale != 1 and spec.experts.weight_on == "output":
        routing = replace(spec.routing, scale=spec.routing.scale * spec.output_scale)
        specs.append(replace(spec, output_scale=1.0, routing=routing))
    for beside_zero in (False, True) if spec.shared is None else (False,):
        for said in specs:
            if found := _search(partial(_around, said, beside_zero), dtype, _PARTS):
                return found
    raise Unsupported(f"transformers has no layer that computes {_said(spec)}, in {dtype}")


def for_router(routing: RoutingSpec, dtype: str) -> Found:
    """A family whose block routes so, and a small layer of it."""
    if found := _search(lambda family: replace(family.layer, routing=routing), dtype, ("routing",)):
        return found
    raise Unsupported(f"transformers has no router that computes {_said(routing)}, in {dtype}")


def for_router_module(logits: LogitsSpec, routing: RoutingSpec, dtype: str) -> Found:
    """A family whose router, given hidden states, routes so by itself, and a small layer of it."""

    def small(family: Family) -> LayerSpec | None:
        return replace(family.layer, routing=routing, logits=logits) if family.lone_router else None

    if found := _search(small, dtype, ("routing", "logits")):
        return found
    raise Unsupported(
        f"transformers has no router module of {_said(logits)} that computes {_said(routing)}, in {dtype}"
    )


def for_experts(mlp: MLPSpec, identity_experts: int, dtype: str) -> Found:
    """A family with those experts, and a small layer of it."""

    def small(family: Family) -> LayerSpec | None:
        passes = "routing.identity_experts" in family.keys
        # Experts that have a capacity are told of one token an expert at a time.
        if passes != bool(identity_experts) or family.layer.routing.capacity is not None:
            return None
        routing = replace(family.layer.routing, identity_experts=identity_experts)
        return _with_shared(replace(family.layer, experts=mlp, routing=routing), family)

    if found := _search(small, dtype, ("experts",)):
        return found
    beside = f" beside {identity_experts} that pass their input on" if identity_experts else ""
    raise Unsupported(f"transformers has no experts that compute {_said(mlp)}{beside}, in {dtype}")


def _search(spec_for: Callable[[Family], LayerSpec | None], dtype: str, parts: tuple[str, ...]) -> Found | None:
    """The first family whose row, with the spec's values in it, is the spec in these parts.

    Where all is float32, "input" is float32, too; but a family that says the same word comes first.
    """
    for narrow in dict.fromkeys((True, dtype != "float32")):
        for family in available():
            spec = spec_for(family)
            if spec is not None and (found := _expressed(family, spec, narrow, parts)) is not None:
                return family, found
    return None


def _around(spec: LayerSpec, beside_zero: bool, family: Family) -> LayerSpec | None:
    """The spec, or the spec and a shared expert without which the family has no layer; zero, if it is added as is."""
    if beside_zero and (family.layer.shared is None or family.layer.shared.combine != "sum"):
        return None
    return _with_shared(spec, family) if beside_zero else spec


def _with_shared(spec: LayerSpec, family: Family) -> LayerSpec:
    """The spec and a shared expert as the family has one, of what the spec's experts are."""
    if family.layer.shared is None:
        return spec
    said = {name: getattr(spec.experts, name) for name in ("width", "activation", "limit", "alpha")}
    return replace(spec, shared=replace(family.layer.shared, mlp=replace(family.layer.shared.mlp, **said)))


def config_of(family: Family, spec: LayerSpec) -> dict[str, Any]:
    """config.json of a model whose one layer computes the spec. Raises KeyError where no config says that."""
    found: dict[str, Any] = {"model_type": family.model_type, **_SMALL, **family.always}
    said: dict[str, Any] = {}
    for path, key in family.keys.items():
        value = _value(spec, path)
        value = _WORDS.get(path.rpartition(".")[2], {value: value})[value]
        if key and said.setdefault(key, value) != value:
            raise KeyError(key)
    for key, value in said.items():
        outer, _, inner = key.rpartition(".")
        level = found.setdefault(outer, {}) if outer else found
        level[inner] = [value] if key in _BY_LAYER else value
    return found


def _expressed(family: Family, spec: LayerSpec, narrow: bool, parts: tuple[str, ...]) -> LayerSpec | None:
    """The family's spec with the values of this one, if the parts named are then equal, and None otherwise."""
    values = {path: _value(spec, path) for path in family.keys}
    found = filled(family.layer, {path: value for path, value in values.items() if value is not None})
    if found.routing.selection_bias and not spec.routing.selection_bias:
        spec = replace(spec, routing=replace(spec.routing, selection_bias=True))  # of zeros, as it is initialised
    row, want = at_rest(found, narrow), at_rest(spec, narrow)
    if any(getattr(row, part) != getattr(want, part) for part in parts):
        return None
    try:
        config_of(family, found)
    except KeyError:
        return None
    return found


def filled(layer: LayerSpec, values: Mapping[str, Any]) -> LayerSpec:
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


def _value(spec: Any, path: str) -> Any:
    """The field of a dotted name; None below a part that the spec does not have."""
    for name in path.split("."):
        spec = getattr(spec, name, None)
    return spec


def at_rest(spec: LayerSpec, narrow: bool) -> LayerSpec:
    """The same layer with the fields that nothing reads at their defaults; narrow: x is not float32."""
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


def _said(spec: Any) -> str:
    """The spec without the fields that are at their defaults."""
    parts = [f"{name}={value}" for name, value in _changed(spec)]
    return f"{type(spec).__name__}({', '.join(parts)})"


def _changed(spec: Any) -> Iterator[tuple[str, str]]:
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.default is MISSING or value != item.default:
            yield item.name, _said(value) if is_dataclass(value) else repr(value)
