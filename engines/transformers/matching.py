"""From a spec to a family whose own classes compute it, and to the config that makes them do so.

A family computes a spec if its record yields that spec once its config keys are set to the spec's values. What is
judged is always the family's own code; a spec that no family computes is refused.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

from moe_conformance.engine import RECORDS, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, inverse
from moe_conformance.engines.transformers.block import Block, block_of, model_types
from moe_conformance.engines.transformers.block_routing import FORMS
from moe_conformance.engines.transformers.filling import source
from moe_conformance.errors import Unsupported

# The parts of a layer that follow its logits.
_PARTS = tuple(item.name for item in fields(LayerSpec) if item.name not in ("logits", "vocab_size"))
# Size of what does not matter: experts after a router, and hidden states when logits are given.
UNSEEN = 8

# Routers that do not answer with scores, weights and ids, in addition to those in block_routing.FORMS.
_OTHER_ANSWERS = ("DbrxRouter",)


@dataclass(frozen=True)
class Found:
    """A family's setting, the spec completed by what the family always has, and the config for it.

    own_shared: the shared expert has sizes that no config says; it is built by itself, of the family's class.
    """

    setting: inverse.Setting
    spec: LayerSpec
    config: dict[str, Any]
    own_shared: bool

    def block(self) -> Block:
        """On the meta device, and shared: a copy is filled."""
        return block_of(json.dumps(self.config), self.setting.layer)


@cache
def available() -> tuple[inverse.Setting, ...]:
    """The settings of every family that the installed transformers has and whose routing can be read and replaced."""
    return tuple(
        setting
        for name in sorted(model_types() & {record.model_type for record in RECORDS.values()})
        for setting in inverse.settings(name)
        if setting.record.block and setting.record.block.given
    )


@lru_cache(maxsize=256)
def for_layer(spec: LayerSpec, dtype: str) -> Found:
    """A family with that layer, from its logits on; its spec has a shared expert where the model always has one.

    Scaling the weighted sum is the same as scaling every weight.
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


@lru_cache(maxsize=256)
def for_router(routing: RoutingSpec, experts: int, vocabulary: int, dtype: str) -> Found:
    """A family whose block routes so, and a small layer of it."""

    def small(setting: inverse.Setting) -> LayerSpec:
        return inverse.small(setting.spec, routing, experts, UNSEEN, vocab_size=vocabulary)

    if found := _search(small, dtype, ("routing", "num_experts")):
        return found
    raise Unsupported(f"transformers has no router that computes {_said(routing)}, in {dtype}")


@lru_cache(maxsize=256)
def for_router_module(logits: LogitsSpec, routing: RoutingSpec, experts: int, hidden: int, dtype: str) -> Found:
    """A family whose router, given hidden states, routes so by itself, and a small layer of it."""

    def small(setting: inverse.Setting) -> LayerSpec:
        return inverse.small(setting.spec, routing, experts, UNSEEN, logits=logits, hidden_size=hidden)

    if found := _search(small, dtype, ("routing", "logits", "num_experts", "hidden_size"), _is_a_module):
        return found
    raise Unsupported(
        f"transformers has no router module of {_said(logits)} that computes {_said(routing)}, in {dtype}"
    )


@lru_cache(maxsize=256)
def for_experts(mlp: MLPSpec, experts: int, identity_experts: int, top_k: int, width: int, dtype: str) -> Found:
    """A family with those experts, and a small layer of it. width: of what the experts read."""

    def small(setting: inverse.Setting) -> LayerSpec | None:
        routing = setting.spec.routing
        # Experts with a capacity can only be given one token per expert at a time.
        if ("routing.identity_experts" in setting.decided) != bool(identity_experts) or routing.capacity is not None:
            return None
        if "routing.top_k" not in setting.decided and routing.top_k != top_k:
            return None
        routing = replace(routing, identity_experts=identity_experts, top_k=top_k, groups=1, top_groups=1)
        spec = inverse.small(setting.spec, routing, experts, mlp.width, hidden_size=width)
        latent = spec.latent and replace(spec.latent, width=width)
        return _with_shared(replace(spec, experts=mlp, latent=latent), setting)

    if found := _search(small, dtype, ("experts", "num_experts")):
        return found
    beside = f" beside {identity_experts} that pass their input on" if identity_experts else ""
    raise Unsupported(f"transformers has no experts that compute {_said(mlp)}{beside}, in {dtype}")


def _is_a_module(found: Found) -> bool:
    """Whether the router is asked alone, and keeps each tensor as it is given."""
    block = found.block()
    return routes_alone(block.moe) and all(source(block.moe, name).is_whole for name in router_tensors(block))


def router_tensors(block: Block) -> list[str]:
    """Names of the router's tensors in the block."""
    router = router_of(block.moe)
    path = next(name for name, module in block.root.named_modules() if module is router)
    return [f"{path}.{name}" for name in router.state_dict()]


def routes_alone(moe: Any) -> bool:
    """Whether the block's router needs nothing but hidden states, and answers with weights and ids."""
    router = router_of(moe)
    takes = inspect.signature(router.forward).parameters.keys() - {"hidden_states", "router_states"}
    return not takes and type(router).__name__ not in (*FORMS, *_OTHER_ANSWERS)


def router_of(moe: Any) -> Any:
    return moe.gate if hasattr(moe, "gate") else moe.router


def _search(
    spec_for: Callable[[inverse.Setting], LayerSpec | None],
    dtype: str,
    parts: tuple[str, ...],
    accepts: Callable[[Found], bool] = lambda _: True,
) -> Found | None:
    """The first family of which its record, with the spec's values, says the spec in these parts.

    If everything is float32, "input" means float32, too; but a family with the same word is preferred.
    """
    for narrow in dict.fromkeys((True, dtype != "float32")):
        for setting in available():
            spec = spec_for(setting)
            found = None if spec is None else _expressed(setting, spec, narrow, parts)
            if found is not None and accepts(found):
                return found
    return None


def _expressed(setting: inverse.Setting, spec: LayerSpec, narrow: bool, parts: tuple[str, ...]) -> Found | None:
    """The family's spec with this spec's values, and a config for it, if the named parts are then equal."""
    if (answer := inverse.expressed(setting, spec, parts, narrow, _shared_as_in)) is None:
        return None
    wanted, read = answer
    own_shared = "shared" in parts and read.spec != _shared_as_in(read.spec, wanted)
    found = Found(setting, wanted, read.config, own_shared)
    return found if not own_shared or shared_class(found.block().moe) else None


def _shared_as_in(spec: LayerSpec, other: LayerSpec) -> LayerSpec:
    """The spec with the shared expert's sizes from another one."""
    if spec.shared is None or other.shared is None:
        return spec
    sizes = {name: getattr(other.shared.mlp, name) for name in ("width", "activation")}
    return replace(spec, shared=replace(spec.shared, mlp=replace(spec.shared.mlp, **sizes)))


def shared_class(moe: Any) -> tuple[str, type] | None:
    """The name and class of the block's shared expert, where it takes a width of its own."""
    for name in ("shared_experts", "shared_expert"):
        if mlp := getattr(moe, name, None):
            return (name, type(mlp)) if "intermediate_size" in inspect.signature(type(mlp)).parameters else None
    return None


def _around(spec: LayerSpec, beside_zero: bool, setting: inverse.Setting) -> LayerSpec | None:
    """The spec, plus a shared expert if the family always has one; a zero one if it is simply added."""
    shared, dense = setting.spec.shared, setting.spec.dense
    if spec.dense is None and dense is not None and dense.norm_eps:
        spec = replace(spec, dense=dense)  # Gemma 4's dense MLP: its router and experts run without it
    if beside_zero and (shared is None or shared.combine != "sum"):
        return None
    return _with_shared(spec, setting) if beside_zero else spec


def _with_shared(spec: LayerSpec, setting: inverse.Setting) -> LayerSpec:
    """The spec and a shared expert as the family has one, of what the spec's experts are."""
    shared = setting.spec.shared
    if shared is None:
        return spec
    said = {name: getattr(spec.experts, name) for name in ("width", "activation", "limit", "alpha")}
    return replace(spec, shared=replace(shared, mlp=replace(shared.mlp, **said)))


def _said(spec: Any) -> str:
    """The spec without the fields that are at their defaults."""
    parts = [f"{name}={value}" for name, value in _changed(spec)]
    return f"{type(spec).__name__}({', '.join(parts)})"


def _changed(spec: Any) -> Iterator[tuple[str, str]]:
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.default is MISSING or value != item.default:
            yield item.name, _said(value) if is_dataclass(value) else repr(value)
