"""The config stage: what a model config says about its Mixture-of-Experts layers.

A config arrives as a transformers object or as the plain dict of a config.json, flat or nested, in the spelling of
the library or of the hub. The record of its model family says by which names its sizes are read (sizes.py), by which
rule its MoE layers (layers.py), and what a layer computes (layer_spec.py); a model type without a record is read by its
keys where they leave no doubt (unknown.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.model.description import CaptureShape, MoESpec
from moe_conformance.model.families.families import (
    EXPERTS,
    NESTED,
    NESTED_LAST,
    RECORDS,
    Families,
    by_its_keys,
)
from moe_conformance.model.families.keys import WHAT
from moe_conformance.model.families.layer_spec import layer_specs
from moe_conformance.model.families.record import TOP_K, Record
from moe_conformance.model.families.scope import Scope, levels, model_type_of, plain
from moe_conformance.model.families.sizes import dense_error, sizes_of
from moe_conformance.model.families.unknown import layers_by_keys
from moe_conformance.model.specs import LayerSpec
from moe_conformance.quote import few, quoted


def describe(config: Any, families: Families = RECORDS) -> MoESpec:
    """Read experts, top-k, MoE layers, shared experts and widths from a config, and what each MoE layer computes.

    config: a transformers config or its plain dict, flat or nested (text_config, ffn_config, thinker_config, ...;
    vision_config only where nothing else has experts).
    `layers` is empty where the config does not determine what a layer computes; `undetermined` and the error of
    `layer_of` say why.
    Raises DenseModelError for a model without routed experts, ConfigError for a size that is missing or wrong.

        describe({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
                  "num_local_experts": 8, "num_experts_per_tok": 2})
        -> MoESpec(num_layers=2, moe_layers=(0, 1), num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=96,
                   layers=(LayerSpec(...), LayerSpec(...)))
    """
    scope, record, spec = find(config, families)
    try:
        return replace(spec, layers=_layers(scope, record, spec))
    except ConfigError as error:
        return replace(spec, undetermined=str(error))


def layer_of(config: Any, layer: int, families: Families = RECORDS) -> LayerSpec:
    """What one MoE layer computes.

    layer: decoder layer (of the encoder, where that alone has experts).
    Raises as `describe` does, and ConfigError where the layer has no experts, a key of its method is wrong, or its
    model type is unknown and its keys are not those of one method alone: the message names keys and candidates.
    """
    scope, record, spec = find(config, families)
    moe_layers = spec.moe_layers or spec.encoder_moe_layers
    if layer not in moe_layers:
        raise scope.error(WHAT, f"layer {quoted(layer)} has no experts; want one of {few(moe_layers)}")
    return _layers(scope, record, spec)[moe_layers.index(layer)]


def capture_shape(config: Any) -> CaptureShape:
    """The sizes of a routed-experts buffer, for every side that needs them: all runs of layers, the largest K and E."""
    spec = find(config, RECORDS)[2]
    return CaptureShape(len(spec.runs), spec.max_top_k, spec.max_experts)


def find(config: Any, families: Families = RECORDS) -> tuple[Scope, Record | None, MoESpec]:
    """The level that describes the MoE, the record of its family, if there is one, and the sizes."""
    values = plain(config)
    dense = None
    for scope, record in _candidates(values, families):
        try:
            return scope, record, sizes_of(scope, record.sizes if record else by_its_keys(scope))
        except DenseModelError as error:
            dense = dense or error
    raise dense or dense_error(Scope(values, "", _name(values)), f"no level has any of {', '.join((*EXPERTS, *TOP_K))}")


def _candidates(values: Mapping[str, Any], families: Families) -> Iterator[tuple[Scope, Record | None]]:
    """The levels that may describe the MoE, innermost first, each with the record that says how to read it."""
    root = _name(values)
    found = False
    for path, level in [*levels(values, NESTED), *levels(values, NESTED_LAST)]:
        if not path and found:
            continue  # the level below describes the model
        own = model_type_of(level)
        text = path.endswith("text_config") or not path
        record = families.record_of(own or root) if text else families.get(own)
        if record or any(level.get(key) is not None for key in (*EXPERTS, *TOP_K)):
            found = True
            yield Scope(level, path, root if own in ("", root) else f"{root} ({own})"), record


def _name(values: Mapping[str, Any]) -> str:
    return model_type_of(values) or "model without model_type"


def _layers(scope: Scope, record: Record | None, spec: MoESpec) -> tuple[LayerSpec, ...]:
    return layer_specs(scope, record, spec) if record else layers_by_keys(scope, spec)
