"""Blocks that route, combine or compute otherwise than their model does, most of them for some families alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import BlockInputs, BlockOutput, LayerSpec, Routing
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl import block as stage
from moe_conformance.reference_impl.layer import LayerOutput, layer, shared_output
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import route_logits

Tensors = Mapping[str, Tensor]


class FaultyBlock(Faulty):
    """The reference's block, whose layer has another spec, other tensors or another routing."""

    def block(self, inputs: BlockInputs) -> BlockOutput:
        return stage.block(inputs, self.layer_of)

    def layer_of(self, x: Tensor, spec: LayerSpec, tensors: Tensors, **more: Any) -> LayerOutput:
        return layer(x, self.spec(spec, len(x)), self.tensors(tensors, spec), **more)

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return spec

    def tensors(self, tensors: Tensors, spec: LayerSpec) -> Tensors:
        return tensors


class Rerouted(FaultyBlock):
    """Changes a routing that is not given, and reports the changed one."""

    def layer_of(self, x: Tensor, spec: LayerSpec, tensors: Tensors, **more: Any) -> LayerOutput:
        if more.get("routing") is None:
            own = layer(x, spec, tensors, **more)
            more["routing"] = self.rerouted(Routing(own.ids, own.weights), x, spec, tensors)
        return layer(x, spec, tensors, **more)

    def rerouted(self, own: Routing, x: Tensor, spec: LayerSpec, tensors: Tensors) -> Routing:
        raise NotImplementedError


class BlockBiasWeighs(Rerouted):
    """transformers#39581, PaddleFormers#3452: weights are gathered from the biased scores, of sigmoid routers alone."""

    def rerouted(self, own: Routing, x: Tensor, spec: LayerSpec, tensors: Tensors) -> Routing:
        routing = spec.routing
        if not (routing.selection_bias and routing.score == "sigmoid" and routing.renormalize == "sum"):
            return own
        scores = router_logits(x, spec.logits, tensors)[0].float().sigmoid()
        biased = (scores + tensors["router.selection_bias"]).gather(1, own.ids)
        return Routing(own.ids, biased / biased.sum(1, keepdim=True) * routing.scale)


class BlockScaleUnlessRenormed(FaultyBlock):
    """sglang-jax#1282: the factor of the weights is applied in the branch that renormalises, and only there."""

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        scale = spec.routing.scale if spec.routing.renormalize == "sum" else 1.0
        return replace(spec, routing=replace(spec.routing, scale=scale))


class BlockGroupsByTheirBest(FaultyBlock):
    """Groups compete by their best score where the model adds their best two."""

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return replace(spec, routing=replace(spec.routing, group_score="max"))


class BlockNarrowLogits(Rerouted):
    """Logits are stored in x's dtype where the model has them in float32."""

    def rerouted(self, own: Routing, x: Tensor, spec: LayerSpec, tensors: Tensors) -> Routing:
        if spec.logits.dtype != "float32" or spec.routing.selector == "table":
            return own
        logits = router_logits(x, spec.logits, tensors)[0].to(x.dtype)
        ids, weights, _ = route_logits(logits, spec.routing, tensors)
        return Routing(ids, weights)


class BlockOutputScaleTwice(FaultyBlock):
    """vllm#24119, vllm#45037."""

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return replace(spec, output_scale=spec.output_scale**2)


class BlockOneTokenDownBias(FaultyBlock):
    """The branch for one token has no second bias."""

    def layer_of(self, x: Tensor, spec: LayerSpec, tensors: Tensors, **more: Any) -> LayerOutput:
        if len(x) == 1 and "experts.b2" in tensors:
            tensors = {**tensors, "experts.b2": torch.zeros_like(tensors["experts.b2"])}
        return layer(x, spec, tensors, **more)


class BlockSumNormDropped(FaultyBlock):
    """The routed sum of a layer with a dense MLP beside it is not scaled by its norm."""

    def tensors(self, tensors: Tensors, spec: LayerSpec) -> Tensors:
        norm = tensors.get("experts.sum_norm")
        return tensors if norm is None else {**tensors, "experts.sum_norm": torch.ones_like(norm)}


class BlockLatentGetsTheScale(FaultyBlock):
    """The factor of the weights also meets what the latent projection reads."""

    def tensors(self, tensors: Tensors, spec: LayerSpec) -> Tensors:
        if spec.latent is None:
            return tensors
        return {**tensors, "latent.out": tensors["latent.out"] * spec.routing.scale}


class BlockFarLimitDropped(FaultyBlock):
    """vllm#42855, sglang#39939: limits that most tokens do not reach are not handed on."""

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        clamp = "no" if spec.experts.clamp == "before" and spec.experts.limit >= 4 else spec.experts.clamp
        return replace(spec, experts=replace(spec.experts, clamp=clamp))


class BlockGeluErf(FaultyBlock):
    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        activation = "gelu" if spec.experts.activation == "gelu_tanh" else spec.experts.activation
        return replace(spec, experts=replace(spec.experts, activation=activation))


class BlockReluUnsquared(FaultyBlock):
    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        activation = "relu" if spec.experts.activation == "relu2" else spec.experts.activation
        return replace(spec, experts=replace(spec.experts, activation=activation))


class BlockUpOffsetDropped(FaultyBlock):
    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return replace(spec, experts=replace(spec.experts, up_offset=0.0))


class Regiven(FaultyBlock):
    """Changes a routing that is given."""

    def block(self, inputs: BlockInputs) -> BlockOutput:
        if inputs.routing is not None:
            inputs = replace(inputs, routing=self.regiven(inputs, *inputs.routing))
        return stage.block(replace(inputs, native_ids=False))

    def regiven(self, inputs: BlockInputs, ids: Tensor, weights: Tensor) -> Routing:
        raise NotImplementedError


class BlockStopsAtDropped(Regiven):
    """The loop over a token's experts ends at the first that is missing."""

    def regiven(self, inputs: BlockInputs, ids: Tensor, weights: Tensor) -> Routing:
        ended = (ids < 0).cumsum(1) > 0
        return Routing(ids.masked_fill(ended, -1), weights)


class BlockRenormsWhatIsLeft(Regiven):
    """Weights of the pairs that were not dropped are made to sum to what all of them would."""

    def regiven(self, inputs: BlockInputs, ids: Tensor, weights: Tensor) -> Routing:
        left = weights.masked_fill(ids < 0, 0)
        return Routing(ids, left / left.sum(1, keepdim=True).clamp(min=0.125))


class BlockMinusOneWraps(Regiven):
    """vllm#46408, vllm#48371."""

    def regiven(self, inputs: BlockInputs, ids: Tensor, weights: Tensor) -> Routing:
        return Routing(ids.where(ids >= 0, len(inputs.tensors["experts.w2"]) - 1), weights)


class BlockBeyondWraps(Regiven):
    def regiven(self, inputs: BlockInputs, ids: Tensor, weights: Tensor) -> Routing:
        experts = stage.layer_spec(inputs.config, inputs.layer)
        last = experts.num_experts + experts.routing.identity_experts
        return Routing(ids.where(ids < last, 0), weights)


class BlockSharedTwice(FaultyBlock):
    """sglang#31475: both the kernel and the model add it, where it has no gate."""

    def layer_of(self, x: Tensor, spec: LayerSpec, tensors: Tensors, **more: Any) -> LayerOutput:
        found = layer(x, spec, tensors, **more)
        if spec.shared is None or spec.shared.gate or spec.shared.weighted:
            return found
        return found._replace(output=found.output + shared_output(x, spec.shared, tensors, None))


class BlockSharedGateDropped(FaultyBlock):
    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return replace(spec, shared=spec.shared and replace(spec.shared, gate=False))


class BlockSharedSums(FaultyBlock):
    """The shared expert's output is added where the model takes the mean."""

    def spec(self, spec: LayerSpec, tokens: int) -> LayerSpec:
        return replace(spec, shared=spec.shared and replace(spec.shared, combine="sum"))


class BlockNoWeightNoShared(FaultyBlock):
    """A token whose experts all weigh nothing is skipped as a whole."""

    def layer_of(self, x: Tensor, spec: LayerSpec, tensors: Tensors, **more: Any) -> LayerOutput:
        found = layer(x, spec, tensors, **more)
        skipped = (found.weights == 0).all(1, keepdim=True)
        return found._replace(output=found.output.masked_fill(skipped, 0))


ROUTES = "a_block_routes_as_its_model_does"
BLOCK = "a_block_computes_what_its_model_does"
FUNCTION = "experts_compute_their_own_function"
DROPPED = "a_dropped_pair_adds_nothing"
NO_EXPERT = "an_id_of_no_expert_is_refused_or_adds_nothing"
ALWAYS_ON = "what_is_always_on_is_added_once"
# A block's output has experts in it, and what is always on.
OUTPUT = frozenset({"activation", "combine-algebra", "expert-map", "shared-experts"})


def _mutant(
    engine: type[Faulty], bug_class: str, fault: str, case: str, check: str, also: frozenset[str] = OUTPUT
) -> Mutant:
    return Mutant(engine, bug_class, fault, (f"family-{case}", check), also)


def _routing(engine: type[Faulty], fault: str, case: str, check: str = ROUTES) -> Mutant:
    return _mutant(engine, "routing-semantics", fault, case, check, frozenset())


MUTANTS = (
    _routing(BlockBiasWeighs, "the selection bias is in the weights", "deepseek-v3-route"),
    _routing(BlockGroupsByTheirBest, "groups compete by their best score", "deepseek-v3-route"),
    _routing(
        BlockNarrowLogits,
        "logits are rounded to bfloat16",
        "deepseek-v3-bf16-route",
        "a_block_in_a_narrow_dtype_routes_as_its_model_does",
    ),
    _mutant(
        BlockScaleUnlessRenormed,
        "combine-algebra",
        "no factor without a renorm",
        "deepseek-v2-block",
        BLOCK,
        OUTPUT | {"routing-semantics"},
    ),
    _mutant(BlockOutputScaleTwice, "combine-algebra", "the output scale is applied twice", "laguna-block", BLOCK),
    _mutant(BlockOneTokenDownBias, "combine-algebra", "one token gets no b2", "gpt-oss-one-token", BLOCK),
    _mutant(BlockSumNormDropped, "combine-algebra", "the norm of the sum is left out", "gemma4-block", BLOCK),
    _mutant(BlockLatentGetsTheScale, "combine-algebra", "the latent sum is scaled again", "nemotron-h-block", BLOCK),
    _mutant(BlockFarLimitDropped, "activation", "a limit of 7 is dropped", "gpt-oss-beyond-limit", FUNCTION),
    _mutant(BlockGeluErf, "activation", "gelu is exact for tanh", "gemma4-experts", FUNCTION),
    _mutant(BlockReluUnsquared, "activation", "relu2 is not squared", "nemotron-h-experts", FUNCTION),
    _mutant(BlockUpOffsetDropped, "activation", "up is not offset by 1", "gpt-oss-experts", FUNCTION),
    _mutant(BlockStopsAtDropped, "expert-map", "a dropped pair ends its token", "mixtral-dropped", DROPPED),
    _mutant(BlockRenormsWhatIsLeft, "expert-map", "what is left sums to 1", "deepseek-v3-dropped", DROPPED),
    _mutant(BlockMinusOneWraps, "expert-map", "-1 is the last expert", "gpt-oss-no-expert", NO_EXPERT),
    _mutant(BlockBeyondWraps, "expert-map", "id E is the first expert", "mixtral-id-beyond", NO_EXPERT),
    _mutant(BlockSharedTwice, "shared-experts", "shared experts are added twice", "deepseek-v3-shared", ALWAYS_ON),
    _mutant(BlockSharedGateDropped, "shared-experts", "the shared gate is left out", "qwen2-moe-shared", ALWAYS_ON),
    _mutant(BlockSharedSums, "shared-experts", "shared experts are not averaged", "cohere2-moe-shared", ALWAYS_ON),
    _mutant(BlockNoWeightNoShared, "shared-experts", "no weight, no shared expert", "glm4-moe-shared", ALWAYS_ON),
)
