"""Layers in which a part counts twice, not at all, or in another's place."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import LayerInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl import layer as stage


class LayerScalesTheSharedToo(Faulty):
    """The scale multiplies the sum of routed and shared experts."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        spec = inputs.spec
        if spec.shared is None or inputs.padded_hidden or inputs.padded_intermediate:
            return super().layer(inputs)
        return super().layer(replace(inputs, spec=replace(spec, output_scale=1.0))) * spec.output_scale


class LayerSharedReadsTheSum(Faulty):
    """vllm#28939: the routed sum is written into the hidden states, which the shared experts then read."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        spec = inputs.spec
        if spec.shared is None or inputs.padded_hidden or inputs.padded_intermediate:
            return super().layer(inputs)
        routed = super().layer(replace(inputs, spec=replace(spec, shared=None)))
        real = stage.shared_output
        with patch.object(stage, "shared_output", lambda x, *rest: real(routed, *rest)):
            return super().layer(inputs)


class LayerAverageIsASum(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        spec = inputs.spec
        if spec.shared is None:
            return super().layer(inputs)
        return super().layer(replace(inputs, spec=replace(spec, shared=replace(spec.shared, combine="sum"))))


class LayerGateUnused(Faulty):
    """NousResearch/torchtitan#36: the gate of the shared expert is loaded and not used."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        spec = inputs.spec
        if spec.shared is None or inputs.padded_hidden or inputs.padded_intermediate:
            return super().layer(inputs)
        tensors = {name: tensor for name, tensor in inputs.tensors.items() if name != "shared.gate"}
        ungated = replace(spec, shared=replace(spec.shared, gate=False))
        return super().layer(replace(inputs, spec=ungated, tensors=tensors))


class LayerCutsWithoutTokenIds(Faulty):
    """Megatron-LM#4481: of a batch that is cut every part gets the token ids of the first."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.routing.selector != "table" or inputs.token_ids is None:
            return super().layer(inputs)
        first = inputs.token_ids[torch.arange(len(inputs.x)) % 64]
        return super().layer(replace(inputs, token_ids=first))


_CHECK = "each_part_of_a_layer_counts_once"


def _mutant(engine: type[Faulty], fault: str, case: str) -> Mutant:
    return Mutant(engine, "combine-algebra", fault, (f"layer-{case}", _CHECK))


MUTANTS = (
    _mutant(LayerScalesTheSharedToo, "the scale multiplies the shared experts, too", "tiny-shared"),
    _mutant(LayerSharedReadsTheSum, "the shared experts read the routed sum", "tiny-scale1-shared"),
    _mutant(LayerGateUnused, "the shared expert's gate is not used", "shared-gate-shared"),
    Mutant(
        LayerCutsWithoutTokenIds,
        "chunking",
        "all parts of a batch have the first one's token ids",
        ("layer-130-tokens-by-id-plain", "any_number_of_tokens_is_computed"),
    ),
    _mutant(LayerAverageIsASum, "the average of routed and shared experts is a sum", "shared-average-shared"),
)
