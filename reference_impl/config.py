"""The config stage: what a model config says about its Mixture-of-Experts layers.

A config arrives as a transformers object or as the plain dict of a config.json, flat or nested, in the spelling of
the library or of the hub. It is read by the names of its model family (config_families.py) and by rules for its MoE
layers (config_layers.py); a model type that is not listed is read by its keys where they leave no doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_conformance.engine import CaptureShape, MoESpec
from moe_conformance.errors import DenseModelError
from moe_conformance.reference_impl.config_families import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    NESTED,
    NESTED_LAST,
    TOP_K,
    Family,
    by_its_keys,
    family_of,
)
from moe_conformance.reference_impl.config_layers import block_types
from moe_conformance.reference_impl.config_scope import Scope, levels, plain


def describe(config: Any) -> MoESpec:
    """Read experts, top-k, MoE layers, shared experts and widths from a config.

    config: a transformers config or its plain dict, flat or nested (text_config, ffn_config, thinker_config, ...;
    vision_config only where nothing else has experts).
    Raises DenseModelError for a model without routed experts, ConfigError for a key that is missing or wrong.

        describe({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
                  "num_local_experts": 8, "num_experts_per_tok": 2})
        -> MoESpec(num_layers=2, moe_layers=(0, 1), num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=96)
    """
    values = plain(config)
    dense = None
    for scope, family in _candidates(values):
        try:
            return _describe(scope, family)
        except DenseModelError as error:
            dense = dense or error
    raise dense or _dense(Scope(values, "", _name(values)), f"no level has any of {', '.join((*EXPERTS, *TOP_K))}")


def capture_shape(config: Any) -> CaptureShape:
    """The sizes of a routed-experts buffer, for every side that needs them: all layers, the largest top-k and E."""
    spec = describe(config)
    return CaptureShape(spec.num_layers, spec.max_top_k, spec.max_experts)


def _candidates(values: Mapping[str, Any]) -> Iterator[tuple[Scope, Family]]:
    """The levels that may describe the MoE, innermost first, each with the family that says how to read it."""
    root = _name(values)
    found = False
    for path, level in [*levels(values, NESTED), *levels(values, NESTED_LAST)]:
        if not path and found:
            continue  # what lies below describes the model
        own = str(level.get("model_type") or "")
        text = path.endswith("text_config") or not path
        family = family_of(own or root) if text else FAMILIES.get(own)
        if family is not None or any(level.get(key) is not None for key in (*EXPERTS, *TOP_K)):
            found = True
            scope = Scope(level, path, root if own in ("", root) else f"{root} ({own})")
            yield scope, family or by_its_keys(scope)


def _name(values: Mapping[str, Any]) -> str:
    return str(values.get("model_type") or "model without model_type")


def _describe(scope: Scope, family: Family) -> MoESpec:
    if family.switch and not scope.get(family.switch):
        raise _dense(scope, f"{family.switch} is {scope.get(family.switch)!r}")
    scope = _spelled_out(scope, family)
    routed = _routed_scope(scope, family)
    if family.least_experts and routed.integer("experts", EXPERTS, least=0) < family.least_experts:
        raise _dense(scope, f"{routed.find('experts', EXPERTS)[0]} is below {family.least_experts}")

    total = scope.integer("layers", family.num_layers) if family.num_layers else len(block_types(scope))
    moe_layers = family.layers(scope, total)
    encoder_moe_layers: tuple[int, ...] = ()
    if family.encoder:
        rule, keys = family.encoder
        encoder_moe_layers = rule(scope, scope.integer("encoder layers", keys))
    if not moe_layers and not encoder_moe_layers:
        raise _dense(scope, f"none of its {total} layers has experts")

    # An encoder alone with experts still has a number of them.
    read_at = moe_layers or (0,)
    extra = scope.optional("experts", family.extra_experts, 0) if family.extra_experts else 0
    experts = tuple(count + extra for count in routed.each("experts", EXPERTS, read_at, total, least=1))
    if isinstance(family.top_k, int):
        top_k: tuple[int, ...] = (family.top_k,) * len(read_at)
    else:
        top_k = routed.each("top-k", family.top_k, read_at, total, least=1)
    for layer, chosen, count in zip(read_at, top_k, experts, strict=True):
        if chosen > count:
            raise routed.error(
                "top-k", f"{chosen} of {count} experts in layer {layer} ({', '.join(TOP_K)}); want at most {count}"
            )
    hidden = scope.integer("hidden size", HIDDEN)
    width = _width(routed, family, read_at, total, hidden)
    shared, shared_width = _shared(scope, family, width[0])
    return MoESpec(
        num_layers=total,
        moe_layers=moe_layers,
        num_experts=_one_or_each(experts),
        top_k=_one_or_each(top_k),
        hidden_size=hidden,
        moe_intermediate_size=_one_or_each(width),
        shared_experts=shared,
        shared_intermediate_size=shared_width,
        latent_size=_latent(scope, family),
        encoder_moe_layers=encoder_moe_layers,
    )


def _routed_scope(scope: Scope, family: Family) -> Scope:
    """The level of experts, top-k and width."""
    if not family.experts_under:
        return scope
    child = scope.get(family.experts_under)
    if child is None:
        raise scope.error("experts", f"found no {family.experts_under}; set it")
    return Scope(plain(child), f"{scope.path}.{family.experts_under}".lstrip("."), scope.model)


def _spelled_out(scope: Scope, family: Family) -> Scope:
    """The level itself, or with a legacy list of each layer's experts (-1: dense) written as its modern keys."""
    counts = scope.get(family.pyramid) if family.pyramid else None
    if counts is None:
        return scope
    top_k = scope.integer("top-k", TOP_K)
    own = {i: {EXPERTS[0]: count, TOP_K[0]: min(top_k, count)} for i, count in enumerate(counts) if count > 0}
    types = ["sparse" if count > 0 else "dense" for count in counts]
    modern = {"mlp_layer_types": types, "per_layer_config": scope.get("per_layer_config") or own}
    return Scope({**scope.values, **modern}, scope.path, scope.model)


def _width(scope: Scope, family: Family, layers: Sequence[int], total: int, hidden: int) -> tuple[int, ...]:
    if isinstance(family.width, int):
        return (family.width,) * len(layers)
    if family.width_of_hidden:
        return (hidden * scope.integer("expert width", (family.width_of_hidden,)),) * len(layers)
    if family.width_entry is not None:
        key, widths = scope.find("expert width", family.width)
        if not isinstance(widths, list | tuple) or len(widths) <= family.width_entry:
            raise scope.error("expert width", f"{key}: got {widths!r}, want a list of widths")
        return (scope.checked("expert width", key, widths[family.width_entry], 1),) * len(layers)
    return scope.each("expert width", family.width, layers, total, least=1)


def _shared(scope: Scope, family: Family, routed_width: int) -> tuple[int, int | None]:
    """How many shared experts, and their summed width."""
    shared = family.shared
    if shared is None:
        return 0, None
    count = shared.count if isinstance(shared.count, int) else scope.integer("shared experts", shared.count, least=0)
    width = scope.integer("shared expert width", shared.width, least=0) if shared.width else routed_width
    return (count, count * width) if count and width else (0, None)


def _latent(scope: Scope, family: Family) -> int | None:
    if not family.latent or (scope.get(family.latent) is None and not family.latent_required):
        return None
    return scope.integer("latent width", (family.latent,))


def _one_or_each(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _dense(scope: Scope, why: str) -> DenseModelError:
    return DenseModelError(
        f"{scope.model} has no routed experts: {why} (in {scope.where} of the config); use an MoE model"
    )
