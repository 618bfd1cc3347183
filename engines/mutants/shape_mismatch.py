"""Layers that let a padded width meet an unpadded one, or padding reach the result."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import LayerInputs, MLPSpec
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl import layer as stage
from moe_conformance.reference_impl import padding


class SharedAddedBeforeCut(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.shared is None or inputs.spec.latent is not None:
            return super().layer(inputs)
        with patch.object(stage, "unpad", lambda x, width: x):
            return super().layer(inputs)[..., : inputs.x.shape[-1]]


class PlainLayerIsNotCut(Faulty):
    """The fix of the fix: cut only where there is a shared expert or a latent projection (vllm#40865)."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.shared is not None or inputs.spec.latent is not None:
            return super().layer(inputs)
        with patch.object(stage, "unpad", lambda x, width: x):
            return super().layer(inputs)


class LatentProjectsPadding(Faulty):
    """The output projection is widened with zeros instead of the padding being cut: zero times garbage is garbage."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.latent is None:
            return super().layer(inputs)

        linear, latent_out = F.linear, inputs.tensors["latent.out"]

        def widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x, padding.pad(weight, x.shape[-1]) if weight is latent_out else weight, bias)

        with patch.object(stage, "unpad", lambda x, width: x), patch.object(F, "linear", widened):
            return super().layer(inputs)


class GateAndUpPaddedAsOne(Faulty):
    """Rows are added below up only, so that the kernel takes up's first rows for gate's last."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        def as_one(tensors: Mapping[str, Tensor], spec: MLPSpec, hidden: int, intermediate: int) -> dict[str, Tensor]:
            padded = padding.pad_expert_weights(tensors, spec, hidden, intermediate)
            w13 = tensors.get("experts.w13")
            if w13 is not None:
                rows = 2 * intermediate - w13.shape[1]
                padded["experts.w13"] = F.pad(w13, (0, hidden - w13.shape[2], 0, rows))
            return padded

        with patch.object(stage, "pad_expert_weights", as_one):
            return super().layer(inputs)


class UninitialisedPadding(Faulty):
    """The padded input columns come from torch.empty: garbage times zero weights is not zero."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        def pad(x: Tensor, width: int) -> Tensor:
            wide = x.new_empty(*x.shape[:-1], width)
            wide[..., : x.shape[-1]] = x
            return wide

        with patch.object(stage, "pad", pad):
            return super().layer(inputs)


class GeluTanhSumsThePadding(Faulty):
    """aiter#5413: the kernel of one activation is not told of the padding, and sums what the padded columns hold."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output, mlp = super().layer(inputs), inputs.spec.experts
        if mlp.activation != "gelu_tanh" or (inputs.padded_intermediate or 0) <= mlp.width:
            return output
        return output + torch.empty_like(output)


class CutsFromTheEnd(Faulty):
    """[:-n] with the number of padded columns, which is empty where there are none."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        def unpad(x: Tensor, width: int) -> Tensor:
            return x[..., : width - x.shape[-1]] if inputs.padded_hidden else x

        with patch.object(stage, "unpad", unpad):
            return super().layer(inputs)


class AccumulatorIsReturned(Faulty):
    """float32 sums of a padded kernel are cast to x's dtype where the shared output is added, and nowhere else."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        return output.float() if inputs.padded_hidden and inputs.spec.shared is None else output


class GraphBreaks(Faulty):
    """A value read on the host in the middle of the layer."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.padded_hidden and inputs.logits.numel() and float(inputs.logits.max()) == float("inf"):
            return torch.zeros_like(inputs.x)
        return super().layer(inputs)


class LogsWhatItPads(Faulty):
    """A call that no graph takes in, which fake tensors do not mind."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.padded_hidden and inputs.padded_intermediate:
            torch._dynamo.graph_break()
        return super().layer(inputs)


_CHECK = "padding_never_reaches_the_output"

MUTANTS = (
    Mutant(
        SharedAddedBeforeCut,
        "shape-mismatch",
        "the shared output is added before the padded routed output is cut (vllm#40794)",
        ("layer-nemotron-3-nano-shared-padded-hidden-padded-intermediate", _CHECK),
    ),
    Mutant(
        PlainLayerIsNotCut,
        "shape-mismatch",
        "a layer without shared expert and latent projection is not cut (vllm#40865)",
        ("layer-gpt-oss-padded-hidden-padded-intermediate", _CHECK),
        also=frozenset({"token-padding"}),
    ),
    Mutant(
        LatentProjectsPadding,
        "shape-mismatch",
        "the latent output projection reads the padded columns",
        ("layer-tiny-latent-padded-hidden", _CHECK),
        also=frozenset({"unwritten-output"}),
    ),
    Mutant(
        GateAndUpPaddedAsOne,
        "shape-mismatch",
        "gate and up are padded as one block",
        ("layer-intermediate-shared-padded-intermediate", _CHECK),
    ),
    Mutant(
        UninitialisedPadding,
        "shape-mismatch",
        "the padded input columns are never written",
        ("layer-tiny-padded-hidden", _CHECK),
        also=frozenset({"unwritten-output"}),
    ),
    Mutant(
        GeluTanhSumsThePadding,
        "shape-mismatch",
        "padded columns are summed where the activation is gelu in its tanh form",
        ("layer-gelu-tanh-padded-hidden-padded-intermediate", _CHECK),
    ),
    Mutant(
        CutsFromTheEnd,
        "shape-mismatch",
        "a padded width that equals the true one cuts everything",
        ("layer-aligned-padded-hidden-padded-intermediate", _CHECK),
    ),
    Mutant(
        AccumulatorIsReturned,
        "shape-mismatch",
        "the output is float32 in a padded layer without shared expert",
        ("layer-sizes-t1-e24-k8-h72-f32-tile64-bf16-padded-hidden-padded-intermediate", _CHECK),
        frozenset({"unwritten-output"}),
    ),
    Mutant(
        GraphBreaks,
        "shape-mismatch",
        "the padded path reads a value on the host",
        ("trace-both-padded-hidden-padded-intermediate", "fake_tensors_have_the_true_shape"),
        also=frozenset({"aliasing-compile"}),
    ),
    Mutant(
        LogsWhatItPads,
        "shape-mismatch",
        "the padded path has a call that breaks the graph",
        ("trace-both-padded-hidden-padded-intermediate", "the_whole_layer_compiles_without_a_graph_break"),
    ),
)
