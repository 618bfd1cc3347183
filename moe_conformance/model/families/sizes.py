"""The sizes that a config level says: experts, top-k, MoE layers, shared experts and widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_conformance.errors import DenseModelError
from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.bounds import MOST_EXPERTS, MOST_LAYERS, MOST_SHARED, MOST_WIDTH
from moe_conformance.model.families.families import EXPERTS, HIDDEN
from moe_conformance.model.families.layers import block_types
from moe_conformance.model.families.record import TOP_K, Sizes
from moe_conformance.model.families.scope import Scope
from moe_conformance.quote import plainly, quoted


def sizes_of(scope: Scope, family: Sizes) -> MoESpec:
    """All of a MoESpec but its layers. Raises DenseModelError, or ConfigError for a size that is missing or wrong."""
    if family.switch and not scope.flag("experts", family.switch):
        raise dense_error(scope, f"{family.switch} is {scope.get(family.switch)!r}")
    scope = spelled_out(scope, family)
    routed = routed_scope(scope, family)
    if family.least_experts and routed.integer("experts", EXPERTS, least=0, most=MOST_EXPERTS) < family.least_experts:
        raise dense_error(scope, f"{routed.find('experts', EXPERTS)[0]} is below {family.least_experts}")

    total = (
        scope.integer("layers", family.num_layers, most=MOST_LAYERS) if family.num_layers else len(block_types(scope))
    )
    moe_layers = family.layers(scope, total)
    encoder_moe_layers: tuple[int, ...] = ()
    if family.encoder:
        rule, keys, encoder_width = family.encoder
        encoder_moe_layers = rule(scope, scope.integer("encoder layers", keys, most=MOST_LAYERS))
    if not moe_layers and not encoder_moe_layers:
        raise dense_error(scope, f"none of its {total} layers has experts")
    if family.encoder and not moe_layers:
        family = replace(family, width=encoder_width)

    # A model with experts only in its encoder still has a number of experts.
    read_at = moe_layers or (0,)
    extra = identity_experts(scope, family)
    experts = tuple(count + extra for count in routed.each("experts", EXPERTS, read_at, total, 1, MOST_EXPERTS))
    if isinstance(family.top_k, int):
        top_k: tuple[int, ...] = (family.top_k,) * len(read_at)
    else:
        top_k = routed.each("top-k", family.top_k, read_at, total, 1, MOST_EXPERTS)
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
        layer_runs=family.runs(scope, total) if family.runs else (),
    )


def identity_experts(scope: Scope, family: Sizes) -> int:
    """How many experts without weights the router also chooses among."""
    if family.extra_experts is None:
        return 0
    key, default = family.extra_experts
    default = default if key not in scope.values else 0
    return scope.optional("experts without weights", key, default, most=MOST_EXPERTS)


def routed_scope(scope: Scope, family: Sizes) -> Scope:
    """The level of experts, top-k and width."""
    if not family.experts_under:
        return scope
    if scope.get(family.experts_under) is None:
        raise scope.error("experts", f"found no {family.experts_under}; set it")
    return scope.below("experts", family.experts_under)


def spelled_out(scope: Scope, family: Sizes) -> Scope:
    """The level itself, or with a legacy list of each layer's experts (-1: dense) written as its modern keys."""
    if not family.pyramid or scope.get(family.pyramid) is None:
        return scope
    key = family.pyramid
    counts = [
        scope.checked("experts", key, count, -1, MOST_EXPERTS)
        for count in scope.sequence("experts", key, scope.get(key))
    ]
    top_k = scope.integer("top-k", TOP_K, most=MOST_EXPERTS)
    own = {i: {EXPERTS[0]: count, TOP_K[0]: min(top_k, count)} for i, count in enumerate(counts) if count > 0}
    types = ["sparse" if count > 0 else "dense" for count in counts]
    modern = {"mlp_layer_types": types, "per_layer_config": scope.get("per_layer_config") or own}
    return Scope({**scope.values, **modern}, scope.path, scope.model)


def _width(scope: Scope, family: Sizes, layers: Sequence[int], total: int, hidden: int) -> tuple[int, ...]:
    if isinstance(family.width, int):
        return (family.width,) * len(layers)
    if family.width_of_hidden:
        return (hidden * scope.integer("expert width", (family.width_of_hidden,)),) * len(layers)
    if family.width_entry is not None:
        key, widths = scope.find("expert width", family.width)
        if not isinstance(widths, list | tuple) or len(widths) <= family.width_entry:
            raise scope.error("expert width", f"{key}: got {quoted(widths)}, want a list of widths")
        return (scope.checked("expert width", key, widths[family.width_entry], 1, MOST_WIDTH),) * len(layers)
    return scope.each("expert width", family.width, layers, total, 1)


def _shared(scope: Scope, family: Sizes, routed_width: int) -> tuple[int, int | None]:
    """How many shared experts, and their summed width."""
    shared = family.shared
    if shared is None:
        return 0, None
    count = shared.count
    if not isinstance(count, int):
        count = scope.integer("shared experts", count, 0, MOST_SHARED)
    width = scope.integer("shared expert width", shared.width, least=0) if shared.width else routed_width
    return (count, count * width) if count and width else (0, None)


def _latent(scope: Scope, family: Sizes) -> int | None:
    if not family.latent or (scope.get(family.latent) is None and not family.latent_required):
        return None
    return scope.integer("latent width", (family.latent,))


def _one_or_each(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def dense_error(scope: Scope, why: str) -> DenseModelError:
    return DenseModelError(
        f"{plainly(scope.model)} has no routed experts: {why} (in {scope.where} of the config); use an MoE model"
    )
