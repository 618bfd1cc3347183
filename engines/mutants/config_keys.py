"""Faults of class config-keys: a key, a nesting, a rule or a list that the engine does not know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal
from unittest.mock import patch

from moe_conformance.engine import CaptureShape, MoESpec
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.model.families import describe as stage
from moe_conformance.model.families import keys as config_keys
from moe_conformance.model.families import words as config_words
from moe_conformance.model.families.families import RECORDS, Families
from moe_conformance.model.families.records import deepseek_v4
from moe_conformance.model.families.scope import Scope, plain
from moe_conformance.model.specs import LayerSpec

_DESCRIBED = "a_config_says_what_the_model_is"
_LAYERS = "a_config_says_how_its_layers_compute"
_BOTH_SIDES = "both_sides_of_capture_take_the_sizes_of_the_model"
_NO_ANSWER = "a_config_without_answer_is_refused_with_the_keys"
_REFUSED = "both_sides_of_capture_refuse_on_purpose"
_NO_EXPERTS = "a_dense_model_is_refused_by_name"

Side = Literal["worker", "reader"]


def text_level(config: Any) -> Mapping[str, Any]:
    values = plain(config)
    return values.get("text_config") or values


class ReadsOnlyOneKey(Faulty):
    """The seed, on both sides."""

    sides: tuple[Side, ...] = ("worker", "reader")

    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        if side not in self.sides:
            return super().capture_shape(config, side)
        if "num_experts_per_tok" not in text_level(config):
            raise AttributeError(f"{type(config).__name__!r} object has no attribute 'num_experts_per_tok'")
        return super().capture_shape(config, side)


class ReaderReadsOnlyOneKey(ReadsOnlyOneKey):
    """Half a fix: the worker knows the other name."""

    sides: tuple[Side, ...] = ("reader",)


class KnowsTwoTopKNames(Faulty):
    """The seed's fix, and no family further."""

    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        with patch.object(stage, "RECORDS", _with_top_k(("num_experts_per_tok", "top_k_experts"))):
            return super().capture_shape(config, side)


def _with_top_k(keys: tuple[str, ...]) -> Families:
    return Families(
        record if isinstance(record.sizes.top_k, int) else replace(record, sizes=replace(record.sizes, top_k=keys))
        for record in RECORDS.values()
    )


class KeepsOneRowALayer(Faulty):
    """A layer that runs again overwrites what it chose before."""

    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        return super().capture_shape(config, side)._replace(layers=self.describe(config).num_layers)


class RemembersAModelType(Faulty):
    """Resolves a model type once a process."""

    def __init__(self) -> None:
        self._known: dict[Any, MoESpec] = {}

    def describe(self, config: Any) -> MoESpec:
        return self._known.setdefault(json.dumps(plain(config).get("model_type")), super().describe(config))


class ReaderLooksAtTheTopLevelOnly(Faulty):
    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        if side == "worker":
            return super().capture_shape(config, side)
        with patch.object(stage, "NESTED", ()):
            return super().capture_shape(config, side)


class ThinkerIsNotOpened(Faulty):
    def describe(self, config: Any) -> MoESpec:
        with patch.object(stage, "NESTED", ("text_config",)):
            return super().describe(config)


class DenseLayersAreOffByOne(Faulty):
    """i > first_k_dense_replace."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        first = plain(config).get("first_k_dense_replace")
        kept = tuple(i for i in spec.moe_layers if first is None or i > first)
        return replace(spec, moe_layers=kept)


class StepStartsAtLayerZero(Faulty):
    """i % decoder_sparse_step, not i + 1."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        values = text_level(config)
        step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers") or ()
        if not step:
            return spec
        return replace(spec, moe_layers=tuple(i for i in range(spec.num_layers) if i % step == 0 and i not in dense))


class SizesOfEveryLayer(Faulty):
    """One number for each layer of the model, dense ones included."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        return replace(spec, top_k=(spec.top_k,) * spec.num_layers) if isinstance(spec.top_k, int) else spec


class LargestTopKForEveryLayer(Faulty):
    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        return replace(spec, top_k=spec.max_top_k)


class TopKListIsItsFirstEntry(Faulty):
    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        shape = super().capture_shape(config, side)
        top_k = self.describe(config).top_k
        return shape if isinstance(top_k, int) else shape._replace(top_k=top_k[0])


class MissingTopKIsOne(Faulty):
    def describe(self, config: Any) -> MoESpec:
        try:
            return super().describe(config)
        except DenseModelError:
            raise
        except ConfigError as error:
            if "top-k: found none" not in str(error):
                raise
            return super().describe({**text_level(config), "num_experts_per_tok": 1})


class LastAliasWins(Faulty):
    def describe(self, config: Any) -> MoESpec:
        with patch.object(Scope, "find", _last_of):
            return super().describe(config)


def _last_of(scope: Scope, what: str, keys: tuple[str, ...]) -> tuple[str, Any]:
    found = [(key, scope.get(key)) for key in keys if scope.get(key) is not None]
    if not found:
        raise scope.error(what, f"found none of {', '.join(keys)}")
    return found[-1]


class TopKAboveExpertsIsCut(Faulty):
    def describe(self, config: Any) -> MoESpec:
        values = plain(config)
        top_k, experts = values.get("num_experts_per_tok"), values.get("num_local_experts")
        if isinstance(top_k, int) and isinstance(experts, int) and top_k > experts > 0:
            return super().describe({**values, "num_experts_per_tok": experts})
        return super().describe(config)


class SwitchIsNotRead(Faulty):
    """A config with expert sizes counts as MoE though its experts are switched off."""

    def describe(self, config: Any) -> MoESpec:
        return super().describe(_switched_on(plain(config)))


def _switched_on(values: Mapping[str, Any]) -> Mapping[str, Any]:
    on = {key: True for key in ("enable_moe_block", "is_moe") if key in values}
    return {**values, **on, **{k: _switched_on(v) for k, v in values.items() if isinstance(v, Mapping)}}


class DenseModelHasOneExpert(Faulty):
    def describe(self, config: Any) -> MoESpec:
        try:
            return super().describe(config)
        except DenseModelError:
            values = text_level(config)
            total, width = values.get("num_hidden_layers", 1), values.get("intermediate_size", 1)
            return MoESpec(total, tuple(range(total)), 1, 1, values.get("hidden_size", 1), width)


class SharedWidthIsOfOne(Faulty):
    """The width of one shared expert, where there are two."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        if spec.shared_experts < 2 or spec.shared_intermediate_size is None:
            return spec
        return replace(spec, shared_intermediate_size=spec.shared_intermediate_size // spec.shared_experts)


class WidthIsTheDenseOne(Faulty):
    """intermediate_size before moe_intermediate_size."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        return replace(
            spec, moe_intermediate_size=text_level(config).get("intermediate_size") or spec.moe_intermediate_size
        )


class LegacyKeysAreForObjects(Faulty):
    """A plain config.json with first_k_dense_replace counts as MoE throughout."""

    def describe(self, config: Any) -> MoESpec:
        if not isinstance(config, Mapping):
            return super().describe(config)
        with patch.object(Scope, "optional", lambda scope, what, key, default, **_: default):
            return super().describe(config)


class ChangesLayers(Faulty):
    """Each layer as `change` makes it of the right one."""

    change: Callable[[LayerSpec], LayerSpec]

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        return replace(spec, layers=tuple(type(self).change(layer) for layer in spec.layers))


def _epsilon_of_another_family(layer: LayerSpec) -> LayerSpec:
    epsilon = 1e-20 if layer.routing.epsilon else 0.0
    return replace(layer, routing=replace(layer.routing, epsilon=epsilon))


def _renormalized(layer: LayerSpec) -> LayerSpec:
    return replace(layer, routing=replace(layer.routing, renormalize="sum"))


def _scaled_in_the_router(layer: LayerSpec) -> LayerSpec:
    scale = layer.routing.scale * layer.output_scale
    return replace(layer, routing=replace(layer.routing, scale=scale), output_scale=1.0)


def _mask_of_deepseek_v3(layer: LayerSpec) -> LayerSpec:
    return replace(layer, routing=replace(layer.routing, group_mask=-math.inf))


def _routed_in_the_input_dtype(layer: LayerSpec) -> LayerSpec:
    return replace(layer, logits=replace(layer.logits, dtype="input"))


def _shared_like_the_experts(layer: LayerSpec) -> LayerSpec:
    if layer.shared is None:
        return layer
    mlp = replace(layer.shared.mlp, clamp=layer.experts.clamp, limit=layer.experts.limit)
    return replace(layer, shared=replace(layer.shared, mlp=mlp))


class EpsilonIsThatOfTheLargestFamily(ChangesLayers):
    change = staticmethod(_epsilon_of_another_family)


class NormFlagIsNotRead(ChangesLayers):
    change = staticmethod(_renormalized)


class OutputScaleGoesIntoTheWeights(ChangesLayers):
    change = staticmethod(_scaled_in_the_router)


class MaskedGroupsAreMinusInfinity(ChangesLayers):
    change = staticmethod(_mask_of_deepseek_v3)


class RouterComputesInTheInputDtype(ChangesLayers):
    change = staticmethod(_routed_in_the_input_dtype)


class SharedExpertsAreClampedToo(ChangesLayers):
    change = staticmethod(_shared_like_the_experts)


class KnowsOnlyHiddenAct(Faulty):
    """Under any other key an activation is silu."""

    def describe(self, config: Any) -> MoESpec:
        with patch.object(config_keys.Key, "read", _read_hidden_act_only):
            return super().describe(config)


_read = config_keys.Key.read


def _read_hidden_act_only(key: config_keys.Key, scope: Scope, layer: int) -> Any:
    return "silu" if key.of is config_words.ACTIVATIONS and key.name != "hidden_act" else _read(key, scope, layer)


class LimitsCountMoELayers(Faulty):
    """The n-th MoE layer takes the n-th limit."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        values = text_level(config)
        limits = values.get("swiglu_limits") or ()
        layers = [
            replace(layer, experts=replace(layer.experts, limit=limit or math.inf, clamp="after" if limit else "no"))
            for layer, limit in zip(spec.layers, limits, strict=False)
        ]
        return replace(spec, layers=(*layers, *spec.layers[len(layers) :]))


class AbsentGroupsAreOne(Faulty):
    """A config.json without n_group has one group, whatever its model's default."""

    def describe(self, config: Any) -> MoESpec:
        values = plain(config)
        absent = {key: 1 for key in ("n_group", "topk_group") if key not in values}
        return super().describe({**values, **absent} if isinstance(config, Mapping) else config)


class DeadNormFlagIsRead(Faulty):
    """DeepSeek-V2's norm_topk_prob, which its model never reads."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        normed = text_level(config).get("norm_topk_prob")
        return replace(spec, layers=tuple(map(_renormalized, spec.layers))) if normed else spec


class HashedLayersAreNot(Faulty):
    """Every layer of DeepSeek-V4 chooses by its scores."""

    def describe(self, config: Any) -> MoESpec:
        with patch.object(deepseek_v4, "is_hashed", lambda scope, layer: False):
            return super().describe(config)


class DenseModelCapturesNothing(Faulty):
    """A buffer of no columns, in place of a refusal."""

    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        try:
            return super().capture_shape(config, side)
        except ConfigError:
            return CaptureShape(0, 0, 0)


class StumblesOverAMissingKey(Faulty):
    def capture_shape(self, config: Any, side: Side) -> CaptureShape:
        try:
            return super().capture_shape(config, side)
        except ConfigError:
            return CaptureShape(1, text_level(config)["top_k_experts"], None)


def _mutant(engine: type[Faulty], fault: str, case: str, check: str) -> Mutant:
    return Mutant(engine, "config-keys", fault, (case, check))


MUTANTS = (
    _mutant(
        ReadsOnlyOneKey, "capture reads num_experts_per_tok only (vllm#41401)", "capture-shape-gemma4", _BOTH_SIDES
    ),
    _mutant(ReaderReadsOnlyOneKey, "the reader's half was not fixed", "capture-shape-gemma4-nested", _BOTH_SIDES),
    _mutant(KnowsTwoTopKNames, "capture knows two names of top-k", "capture-shape-dbrx", _BOTH_SIDES),
    _mutant(
        ReaderLooksAtTheTopLevelOnly, "the reader opens no text_config", "capture-shape-llama4-nested", _BOTH_SIDES
    ),
    _mutant(KeepsOneRowALayer, "one row for a layer that runs again", "capture-shape-inkling2-loop", _BOTH_SIDES),
    _mutant(
        RemembersAModelType,
        "keeps the first config of a model type",
        "config-mixtral-again",
        "each_config_of_a_model_type_gives_its_own_answer",
    ),
    _mutant(ThinkerIsNotOpened, "thinker_config is not opened", "config-qwen3-omni-thinker-nested", _DESCRIBED),
    _mutant(DenseLayersAreOffByOne, "one leading dense layer too many", "config-deepseek-v3", _DESCRIBED),
    _mutant(StepStartsAtLayerZero, "the sparse step counts from layer 0", "config-qwen3-moe", _DESCRIBED),
    _mutant(SizesOfEveryLayer, "a top-k for each layer, dense ones too", "config-qwen3-moe", _DESCRIBED),
    _mutant(
        LargestTopKForEveryLayer,
        "the largest of a list of top-ks for all",
        "config-hunyuan-v1-moe-top-k-list",
        _DESCRIBED,
    ),
    _mutant(
        TopKListIsItsFirstEntry, "takes the first of a list", "capture-shape-hunyuan-v1-moe-top-k-list", _BOTH_SIDES
    ),
    _mutant(MissingTopKIsOne, "a missing top-k becomes 1", "config-gemma4-without-top-k-experts", _NO_ANSWER),
    _mutant(LastAliasWins, "of two aliases that differ the last one wins", "config-qwen3-moe-two-counts", _NO_ANSWER),
    _mutant(TopKAboveExpertsIsCut, "cuts a top-k above the experts", "config-mixtral-top-k-above-experts", _NO_ANSWER),
    _mutant(SwitchIsNotRead, "experts that are switched off count", "config-gemma4-switched-off", _NO_EXPERTS),
    _mutant(DenseModelHasOneExpert, "a dense model passes as one expert", "config-llama-dense", _NO_EXPERTS),
    _mutant(SharedWidthIsOfOne, "the width of one shared expert for the sum", "config-afmoe", _DESCRIBED),
    _mutant(WidthIsTheDenseOne, "the dense width for the experts'", "config-qwen3-moe", _DESCRIBED),
    _mutant(LegacyKeysAreForObjects, "ignores legacy keys of a config.json", "config-kimi-linear-hub", _DESCRIBED),
    _mutant(EpsilonIsThatOfTheLargestFamily, "the epsilon of another family", "config-layers-lfm2-moe", _LAYERS),
    _mutant(
        NormFlagIsNotRead, "renormalises whatever the flag says", "config-layers-qwen3-moe-otherwise-published", _LAYERS
    ),
    _mutant(
        OutputScaleGoesIntoTheWeights,
        "scales weights, where the model scales the sum",
        "config-layers-laguna-published",
        _LAYERS,
    ),
    _mutant(MaskedGroupsAreMinusInfinity, "masks as DeepSeek-V3, not with 0", "config-layers-axk2-published", _LAYERS),
    _mutant(RouterComputesInTheInputDtype, "a float32 router runs in bf16", "config-layers-flint-published", _LAYERS),
    _mutant(SharedExpertsAreClampedToo, "clamps shared experts as routed", "config-layers-hy-v4-published", _LAYERS),
    _mutant(KnowsOnlyHiddenAct, "knows one key of the activation", "config-layers-gemma4-published", _LAYERS),
    _mutant(LimitsCountMoELayers, "takes the clamp limit of another layer", "config-layers-step3p7-published", _LAYERS),
    _mutant(AbsentGroupsAreOne, "forgets the default of n_group", "config-layers-deepseek-v3-hub", _LAYERS),
    _mutant(DeadNormFlagIsRead, "reads a key that the model does not", "config-layers-deepseek-v2", _LAYERS),
    _mutant(HashedLayersAreNot, "does not know layers that hash", "config-layers-deepseek-v4-published", _LAYERS),
    _mutant(DenseModelCapturesNothing, "captures a dense model", "capture-shape-llama-dense", _REFUSED),
    _mutant(StumblesOverAMissingKey, "a bare KeyError", "capture-shape-gemma4-without-top-k", _REFUSED),
)
