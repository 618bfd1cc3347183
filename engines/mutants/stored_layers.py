"""Layers that forget something of their own where their experts are stored in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import LayerInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl import layer as stage


class RoutedUnclampedInTiles(Faulty):
    """tokenspeed#1630: with scales of tiles the routed experts go unclamped; the shared one honours the limit."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.granularity != "block":
            return super().layer(inputs)
        free = replace(inputs.spec.experts, clamp="no")
        return super().layer(replace(inputs, spec=replace(inputs.spec, experts=free)))


class StoredLosesBiases(Faulty):
    """The biases of experts are handed over in the branch of plain weights alone."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.quant is None or not inputs.spec.experts.bias:
            return super().layer(inputs)
        lost = {name: torch.zeros_like(t) if ".b" in name else t for name, t in inputs.tensors.items()}
        return super().layer(replace(inputs, tensors=lost))


class StoredForgetsTheScale(Faulty):
    """In two bytes the scale of the routed sum is believed to be in the scales of the weights."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.quant is None or inputs.x.itemsize != 2:
            return super().layer(inputs)
        return super().layer(replace(inputs, spec=replace(inputs.spec, output_scale=1.0)))


class SharedReadsTheLatent(Faulty):
    """The shared expert beside codes of four bits gets the rows that were projected for the others."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        latent = inputs.spec.latent
        if inputs.quant is None or inputs.quant.format != "int4" or latent is None:
            return super().layer(inputs)
        entry, real = inputs.tensors["latent.in"], stage.shared_output

        def of_latent(x: Tensor, *rest: Any) -> Tensor:
            return real(F.pad(F.linear(x, entry), (0, x.shape[1] - latent.width)), *rest)

        with patch.object(stage, "shared_output", of_latent):
            return super().layer(inputs)


_CHECK = "a_layer_is_whole_around_stored_experts"

MUTANTS = tuple(
    Mutant(engine, "quantised-scales", fault, (f"layer-stored-{case}", _CHECK))
    for engine, fault, case in (
        (RoutedUnclampedInTiles, "with scales of tiles routed experts go unclamped", "fp8-block-clamp-shared"),
        (StoredLosesBiases, "stored experts lose their biases", "mxfp4-swiglu-oai-plain"),
        (StoredForgetsTheScale, "in two bytes stored experts lose the layer's scale", "fp8-block-bf16-shared"),
        (SharedReadsTheLatent, "beside int4 the shared expert reads the latent", "int4-group-zero-shared-latent"),
    )
)
