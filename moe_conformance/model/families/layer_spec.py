"""From a family's record and a layer's sizes to its LayerSpec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.keys import WHAT, is_of_each_layer, resolve
from moe_conformance.model.families.record import Method, Record
from moe_conformance.model.families.scope import Scope
from moe_conformance.model.families.sizes import identity_experts, routed_scope, spelled_out
from moe_conformance.model.specs import (
    Capacity,
    DenseSpec,
    LatentSpec,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RoutingSpec,
    SharedSpec,
)


@dataclass(frozen=True)
class Sizes:
    """Of one layer. experts: those with weights. identity: those without. shared_width: of all shared ones together."""

    hidden: int
    experts: int
    identity: int
    top_k: int
    width: int
    shared: int
    shared_width: int | None
    latent: int | None


def layer_specs(scope: Scope, record: Record, spec: MoESpec) -> tuple[LayerSpec, ...]:
    """What each MoE layer computes, by the record of its family; of the encoder, where that alone has experts.

    spec: the sizes. Raises ConfigError where a value has no meaning for the family.
    """
    identity = identity_experts(scope, record.sizes)
    routed = routed_scope(spelled_out(scope, record.sizes), record.sizes)
    said: dict[Sizes, LayerSpec] = {}  # layers that differ in nothing but sizes
    alike = not any(map(is_of_each_layer, vars(record.method).values()))
    found = []
    for place, layer in enumerate(spec.moe_layers or spec.encoder_moe_layers):
        experts, top_k, width = (
            size if isinstance(size, int) else size[place]
            for size in (spec.num_experts, spec.top_k, spec.moe_intermediate_size)
        )
        sizes = Sizes(
            hidden=spec.hidden_size,
            experts=experts - identity,
            identity=identity,
            top_k=top_k,
            width=width,
            shared=spec.shared_experts,
            shared_width=spec.shared_intermediate_size,
            latent=spec.latent_size,
        )
        is_own = not alike or bool(routed.own(layer))
        layer_says = None if is_own else said.get(sizes)
        if layer_says is None:
            layer_says = layer_spec(routed.at(layer), record.method, sizes, layer)
        if not is_own:
            said[sizes] = layer_says
        found.append(layer_says)
    return tuple(found)


def layer_spec(scope: Scope, method: Method, sizes: Sizes, layer: int) -> LayerSpec:
    """What the layer computes, or ConfigError where its config does not say, or LayerSpec cannot."""
    if method.unsaid:
        raise scope.error(WHAT, method.unsaid)
    say = partial(resolve, scope=scope, layer=layer)
    routing = say(method.routing)
    capacity = routing.pop("capacity", None)
    spec = RoutingSpec(
        top_k=sizes.top_k,
        identity_experts=sizes.identity,
        capacity=Capacity(**capacity) if capacity else None,
        **routing,
    )
    if sizes.experts % spec.groups or spec.top_groups > spec.groups:
        raise scope.error(
            WHAT,
            f"groups: got the best {spec.top_groups} of {spec.groups} for {sizes.experts} experts; want groups of one "
            "size, and no more than there are",
        )
    experts = MLPSpec(sizes.width, **say(method.experts))
    shared = dense = latent = None
    if method.dense is not None:
        dense = DenseSpec(MLPSpec(**say(method.dense_mlp)), **say(method.dense))
    elif sizes.shared_width is not None:
        plain = {"width": sizes.shared_width, "weight_on": "output", "bias": False, **say(method.shared_mlp)}
        shared = SharedSpec(replace(experts, **plain), sizes.shared, **say(method.shared))
    if sizes.latent is not None:
        latent = LatentSpec(sizes.latent, **say(method.latent))
    return LayerSpec(
        hidden_size=sizes.hidden,
        num_experts=sizes.experts,
        logits=LogitsSpec(**say(method.logits)),
        routing=spec,
        experts=experts,
        shared=shared,
        latent=latent,
        dense=dense,
        **say(method.layer),
    )
