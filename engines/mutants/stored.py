"""Experts and layers that are wrong in one stored form, beside one other thing that a call may have."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, LayerInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant


def is_stored(inputs: ExpertsInputs | LayerInputs, *formats: str) -> bool:
    return inputs.quant is not None and inputs.quant.format in formats


class ClampLostInMxfp4(Faulty):
    """sglang#40438: the fused kernel is taken by the format alone, and knows no clamp."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not is_stored(inputs, "mxfp4") or inputs.mlp.alpha != 1:
            return super().experts(inputs)
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, clamp="no")))


class Int4IsAlwaysSilu(Faulty):
    """vllm#14024: the method of weight-only integers is not told the activation."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not is_stored(inputs, "int4") or not inputs.mlp.gated:
            return super().experts(inputs)
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, activation="silu")))


class ScaleTwiceInInt4(Faulty):
    """sglang#12998: the kernel multiplies by the scaling factor, and so does the layer."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not is_stored(inputs, "int4"):
            return super().experts(inputs)
        return super().experts(replace(inputs, output_scale=inputs.output_scale**2))


class WeighsTwiceInNvfp4(Faulty):
    """vllm#43694: weights that the input has been multiplied by are multiplied into the output again."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        if is_stored(inputs, "nvfp4") and inputs.mlp.weight_on == "input" and inputs.ids.shape[1] == 1:
            output = (output * inputs.weights).to(output.dtype)
        return output


class MinusOneFaultsInNvfp4(Faulty):
    """vllm#57946: the kernels index their state by the id as it is."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if is_stored(inputs, "nvfp4") and bool((inputs.ids < 0).any()):
            raise RuntimeError("an illegal memory access was encountered")
        return super().experts(inputs)


class OneChoiceScaledUnwritten(Faulty):
    """sglang#40187: what is added up of one choice, and scaled, is a buffer that nothing filled."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        return torch.empty_like(output) if inputs.ids.shape[1] == 1 and inputs.output_scale != 1 else output


class StoredLayerUnnormalised(Faulty):
    """FastDeploy#4449: behind a grouped router, fp8's path is not told to renormalise."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if not is_stored(inputs, "fp8_e4m3") or inputs.spec.routing.groups == 1:
            return super().layer(inputs)
        routing = replace(inputs.spec.routing, renormalize="no")
        return super().layer(replace(inputs, spec=replace(inputs.spec, routing=routing)))


class StoredLayerUnclamped(Faulty):
    """tokenspeed#1630: the routed experts of fp8 in blocks run unclamped, the shared one honours its limit."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if not is_stored(inputs, "fp8_e4m3"):
            return super().layer(inputs)
        experts = replace(inputs.spec.experts, clamp="no")
        return super().layer(replace(inputs, spec=replace(inputs.spec, experts=experts)))


class StoredLayerUnscaled(Faulty):
    """vllm#32437: the kernel of int4 is handed no scaling factor."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if not is_stored(inputs, "int4"):
            return super().layer(inputs)
        routing = replace(inputs.spec.routing, scale=1.0)
        return super().layer(replace(inputs, spec=replace(inputs.spec, routing=routing)))


class StoredLayerUnbiased(Faulty):
    """vllm#46645: the biases of experts are handed over in the branch of plain weights alone."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.quant is None or not inputs.spec.experts.bias:
            return super().layer(inputs)
        lost = {name: torch.zeros_like(t) if ".b" in name else t for name, t in inputs.tensors.items()}
        return super().layer(replace(inputs, tensors=lost))


class StoredRowsFarApart(Faulty):
    """TensorRT-LLM#15887: token times stride is 32 bits wide in the kernels of fp8 in blocks."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if not is_stored(inputs, "fp8_e4m3"):
            return super().experts(inputs)
        row = torch.arange(len(inputs.x))
        near = row.where(row * inputs.x.stride(0) < 2**31, 0)
        return super().experts(replace(inputs, x=inputs.x[near]))


FUNCTION = "stored_experts_compute_their_function"
SUM = "outputs_of_stored_experts_are_weighed_and_summed"
LAYER = "a_layer_is_the_same_around_stored_experts"
NO_EXPERT = "pairs_of_no_expert_add_nothing_to_stored_experts"


def _mutant(engine: type[Faulty], bug_class: str, fault: str, case: str, check: str) -> Mutant:
    return Mutant(engine, bug_class, fault, (f"experts-stored-{case}", check))


MUTANTS = (
    _mutant(ClampLostInMxfp4, "activation", "MXFP4 experts are not clamped", "mxfp4-beside-clamp", FUNCTION),
    _mutant(
        Int4IsAlwaysSilu, "activation", "int4 experts take silu", "int4-group-beside-gelu-tanh-one-token", FUNCTION
    ),
    _mutant(ScaleTwiceInInt4, "combine-algebra", "int4 experts scale twice", "int4-group-beside-scale", SUM),
    _mutant(
        WeighsTwiceInNvfp4, "combine-algebra", "NVFP4 weighs input and output", "nvfp4-beside-weight-on-input", SUM
    ),
    _mutant(MinusOneFaultsInNvfp4, "expert-map", "-1 faults in NVFP4's kernels", "nvfp4-beside-no-expert", NO_EXPERT),
    *(
        Mutant(engine, "combine-algebra", fault, (f"layer-stored-{case}", LAYER))
        for engine, fault, case in (
            (StoredLayerUnnormalised, "fp8 experts behind groups are not renormalised", "fp8-block-deepseek-v3-shared"),
            (StoredLayerUnclamped, "routed experts of fp8 are not clamped", "fp8-block-deepseek-v3-shared"),
            (StoredLayerUnbiased, "stored experts lose their biases", "mxfp4-swiglu-oai-plain"),
            (StoredLayerUnscaled, "int4 experts go unscaled", "int4-group-deepseek-v2-shared"),
        )
    ),
    Mutant(
        StoredRowsFarApart,
        "index-width",
        "rows of x beyond 2^31 elements are the first, of fp8 experts",
        ("experts-far-x-stored", "elements_beyond_32_bits_are_found"),
    ),
    Mutant(
        OneChoiceScaledUnwritten,
        "unwritten-output",
        "one choice with a scale reads a buffer that nothing filled",
        ("experts-written-one-choice-scale", "every_element_is_written"),
        frozenset({"combine-algebra"}),
    ),
)
