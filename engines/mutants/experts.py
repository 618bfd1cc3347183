"""Experts that read their matrices, weights or ids otherwise than they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.suites.experts.inputs import held_pairs

FUNCTION = "experts_compute_their_function"
SUM = "outputs_are_weighed_and_summed"
NO_EXPERT = "pairs_of_no_expert_here_add_nothing"
OUTSIDE = "ids_out_of_range_never_name_an_expert"


class GeluInItsOtherForm(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        other = "gelu" if inputs.mlp.activation == "gelu_tanh" else inputs.mlp.activation
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, activation=other)))


class LimitDropped(Faulty):
    """vllm#42855, sglang#39939: the clamp's limit is not handed to the kernel."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        clamp = "no" if inputs.mlp.clamp == "before" else inputs.mlp.clamp
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, clamp=clamp)))


class DownBiasUnweighted(Faulty):
    """Automodel#2591."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not inputs.mlp.bias or inputs.expert_map is not None:
            return super().experts(inputs)
        bias = inputs.tensors["experts.b2"]
        without = super().experts(replace(inputs, tensors={**inputs.tensors, "experts.b2": torch.zeros_like(bias)}))
        kept = (inputs.ids >= 0)[..., None]
        return without + (bias[inputs.ids.clamp(min=0)] * kept).sum(1) * inputs.output_scale


class ScaleTwice(Faulty):
    """vllm#24119, vllm#45037."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(inputs) * inputs.output_scale


class ScaleSkipsIdentity(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not inputs.identity_experts:
            return super().experts(inputs)
        mine = inputs.ids < inputs.experts
        routed = super().experts(replace(inputs, ids=inputs.ids.where(mine, -1)))
        passed = super().experts(replace(inputs, ids=inputs.ids.where(~mine, -1), output_scale=1.0))
        return routed + passed


class NineBitIds(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(replace(inputs, ids=inputs.ids.where(inputs.ids < 0, inputs.ids & 511)))


class DroppedTakesLast(Faulty):
    """vllm#46408: -1 indexes from the end."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        last = len(inputs.tensors["experts.w2"]) - 1
        ids = inputs.ids.where(inputs.ids >= 0, last) if inputs.expert_map is None else inputs.ids
        return super().experts(replace(inputs, ids=ids))


class OthersWeighZero(Faulty):
    """Pairs of other ranks are multiplied by 0, which makes NaN of NaN."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is None:
            return super().experts(inputs)
        held = (inputs.ids >= 0) & (inputs.expert_map[inputs.ids.clamp(min=0)] >= 0)
        return super().experts(inputs) + (inputs.weights * ~held * 0.0).sum(-1, keepdim=True).to(inputs.x.dtype)


class OutsideWraps(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(replace(inputs, ids=inputs.ids % inputs.experts if inputs.native_ids else inputs.ids))


class OneTokenUnclamped(Faulty):
    """sglang#16972: a single token takes a path that knows neither limit nor alpha."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if len(inputs.x) != 1:
            return super().experts(inputs)
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, clamp="no", alpha=1.0, up_offset=0.0)))


class OneChoiceWeighsTheOutput(Faulty):
    """sglang#7889: with one expert a token, a weight of its input is multiplied into its output."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.ids.shape[1] != 1 or inputs.mlp.weight_on != "input":
            return super().experts(inputs)
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, weight_on="output")))


class ColdRankHasNoRows(Faulty):
    """A rank whose experts no token chose returns no rows instead of zeros."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        return output if inputs.expert_map is None or held_pairs(inputs).any() else output[:0]


class IdleTokensUnwritten(Faulty):
    """prime-rl#2035: of a token without a local expert, the row is left as new_empty gave it."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        if inputs.expert_map is None:
            return output
        held, result = held_pairs(inputs).any(-1), torch.empty_like(output)
        result[held] = output[held]
        return result


# Every sum is of outputs, and every batch with dropped pairs has a sum.
SUMS = frozenset({"activation", "combine-algebra", "expert-map", "quantised-scales", "expert-lora"})


def _mutant(
    engine: type[Faulty], bug_class: str, fault: str, case: str, check: str, also: frozenset[str] = SUMS
) -> Mutant:
    return Mutant(engine, bug_class, fault, (case, check), also)


MUTANTS = (
    _mutant(GeluInItsOtherForm, "activation", "gelu is exact for tanh", "experts-narrow-gelu-tanh", FUNCTION),
    _mutant(LimitDropped, "activation", "the limit of the clamp is dropped", "experts-narrow-swiglu-oai", FUNCTION),
    _mutant(DownBiasUnweighted, "combine-algebra", "b2 is added unweighted", "experts-scale-bias", SUM),
    _mutant(ScaleTwice, "combine-algebra", "the output scale is applied twice", "experts-scale", SUM),
    _mutant(ScaleSkipsIdentity, "combine-algebra", "identity experts go unscaled", "experts-identity-scale", SUM),
    _mutant(NineBitIds, "combine-algebra", "ids wrap at 512", "experts-beyond-512", SUM),
    _mutant(DroppedTakesLast, "expert-map", "-1 is the last expert", "experts-dropped", NO_EXPERT),
    _mutant(OthersWeighZero, "expert-map", "pairs of others count times 0", "experts-ep3-rank1", NO_EXPERT),
    _mutant(OneTokenUnclamped, "activation", "one token goes unclamped", "experts-swiglu-oai-one-token", FUNCTION),
    _mutant(
        OneChoiceWeighsTheOutput,
        "combine-algebra",
        "one choice's weight is of the output",
        "experts-one-choice-weight-on-input",
        SUM,
    ),
    _mutant(ColdRankHasNoRows, "expert-map", "an idle rank has no rows", "experts-ep3-cold-rank", NO_EXPERT),
    _mutant(
        IdleTokensUnwritten,
        "unwritten-output",
        "rows of tokens without an expert here are not written",
        "experts-written-ep3-idle-tokens",
        "every_element_is_written",
        SUMS | {"aliasing-compile", "chunking", "determinism-state", "dtype-stride-arguments", "token-padding"},
    ),
    _mutant(OutsideWraps, "expert-map", "ids wrap around E", "experts-id-e", OUTSIDE),
)
