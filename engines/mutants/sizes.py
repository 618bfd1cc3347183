"""Engines that are wrong where two sizes meet, or that keep float32 numbers in two bytes on one of their ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, LayerInputs, ShardInputs
from moe_conformance.engines.mutants.experts import SUM, SUMS
from moe_conformance.engines.mutants.mutant import Faulty, Mutant


def narrow(tensor: Tensor) -> Tensor:
    """A float32 tensor after a copy in bfloat16."""
    return tensor.bfloat16().float() if tensor.dtype == torch.float32 else tensor


def narrow_part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: narrow(tensor) if name.startswith(prefix) else tensor for name, tensor in tensors.items()}


# --- two bytes on the way


class HundredsReadNarrow(Faulty):
    """From 128 experts on, rows are gathered in bfloat16."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        many = inputs.experts >= 128 and inputs.quant is None
        return super().experts(replace(inputs, x=narrow(inputs.x)) if many else inputs)


class UngatedStoredNarrow(Faulty):
    """The matrices of experts without a gate are kept in bfloat16."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.mlp.gated or inputs.quant is not None:
            return super().experts(inputs)
        return super().experts(replace(inputs, tensors=narrow_part(inputs.tensors, "experts.w")))


class SharedStoredNarrow(Faulty):
    """The layer is float32, its shared expert bfloat16."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        return super().layer(replace(inputs, tensors=narrow_part(inputs.tensors, "shared.")))


class LogitsCopiedNarrow(Faulty):
    """Without a shared expert a fused kernel takes the logits in bfloat16."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        if inputs.spec.shared is not None or inputs.spec.latent is not None:
            return super().layer(inputs)
        return super().layer(replace(inputs, logits=narrow(inputs.logits)))


class SlicesReadNarrow(Faulty):
    """Tensor-parallel ranks get their rows in bfloat16."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        if inputs.tp_size == 1:
            return super().shard(inputs)
        return super().shard(replace(inputs, whole=replace(inputs.whole, x=narrow(inputs.whole.x))))


_LAYER = "each_part_of_a_layer_counts_once"
# What is wrong of whole layers shows wherever these are looked at.
_LAYERS = frozenset({"shape-mismatch", "chunking", "dtype-stride-arguments", "weight-orientation", "determinism-state"})
_EXPERTS = SUMS | {"chunking", "dtype-stride-arguments", "determinism-state", "weight-orientation"}
_PARTS = frozenset({"shared-experts", "eplb", "dtype-stride-arguments", "weight-orientation", "chunking"})

MUTANTS = (
    Mutant(
        HundredsReadNarrow,
        "combine-algebra",
        "x is gathered in bfloat16 from 128 experts on",
        ("experts-hundreds", SUM),
        _EXPERTS,
    ),
    Mutant(
        UngatedStoredNarrow,
        "activation",
        "experts without a gate are kept in bfloat16",
        ("experts-narrow-relu2-not-gated", "experts_compute_their_function"),
        _EXPERTS,
    ),
    Mutant(
        SharedStoredNarrow,
        "combine-algebra",
        "the shared expert is kept in bfloat16",
        ("layer-tiny-scale1-shared", _LAYER),
        _LAYERS,
    ),
    Mutant(
        LogitsCopiedNarrow,
        "combine-algebra",
        "logits are copied to bfloat16",
        ("layer-tiny-scale1-plain", _LAYER),
        _LAYERS,
    ),
    Mutant(
        SlicesReadNarrow,
        "expert-map",
        "tensor-parallel ranks read x in bfloat16",
        ("shard-tp2", "parts_sum_to_the_layer"),
        _PARTS,
    ),
)
