"""Which features the installed transformers offers, derived from the records of the families that it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moe_conformance.engine import Activation, LayerSpec, Limits, inverse
from moe_conformance.engines.transformers import stored
from moe_conformance.engines.transformers.matching import available
from moe_conformance.protocol import features

# Values that have an effect, for the fields that a config key may decide.
_ACTING: dict[str, Any] = {
    "renormalize": "sum",
    "groups": 2,
    "scale": 2.0,
    "output_scale": 2.0,
    "logit_scale": 2.0,
    "logit_softcap": 2.0,
    "identity_experts": 2,
    "shared_classes": 2,
    "selection_bias": True,
    "bias": True,
}
_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def offered(stage: str) -> frozenset[str]:
    """The stage's features that some family has.

    Not all can be combined; a combination that no family has is refused by the call.
    """
    found = {"same_bits", "padding_rows", "dropped_ids", "expert_bounds", "from_meta"}
    for setting in available():
        for layer in _layers(setting):
            if stage == "experts":
                found |= features.of_mlp(layer.experts)
            elif stage == "router_module":
                found |= features.of_routing(layer.routing) | features.of_logits(layer.logits)
            else:
                found |= features.of_layer(layer)
            if layer.routing.identity_experts:
                found.add("identity_experts")
    if stage == "experts":
        found |= stored.formats()
    return frozenset(found & features.words(stage).keys())


def _layers(setting: inverse.Setting) -> Iterator[LayerSpec]:
    """The family's layer as it is, with every optional field active, and with every activation."""
    yield setting.spec
    acting = {path: _ACTING[name] for path in setting.decided if (name := path.rpartition(".")[2]) in _ACTING}
    yield inverse.with_fields(setting.spec, acting)
    for activation in _ACTIVATIONS if "experts.activation" in setting.decided else ():
        yield replace(setting.spec, experts=replace(setting.spec.experts, activation=activation))


def limits(implementation: str) -> dict[str, Limits]:
    """grouped_mm needs rows of a multiple of 16 bytes: eight numbers of two bytes each."""
    if implementation != "grouped_mm":
        return {}
    rows = Limits(multiples={"D": 8, "F": 8})
    return {"experts": rows, "layer": rows}
