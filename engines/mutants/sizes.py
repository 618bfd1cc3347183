"""Engines that are wrong where two sizes meet, or that keep float32 numbers in two bytes on one of their ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import Aligned, AlignInputs, ExpertsInputs, LayerInputs, ShardInputs
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


# --- two sizes at once


def without_tail(w2: Tensor, tile: int) -> Tensor:
    """w2 [E, D, F] with zeros behind the last whole tile of F."""
    kept = torch.arange(w2.shape[-1]) < w2.shape[-1] // tile * tile
    return w2 * kept


class ManyChoicesLoseTheTail(Faulty):
    """The kernel for more than eight choices has no mask for the last columns of F."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.ids.shape[1] <= 8 or inputs.quant is not None or inputs.mlp.width % 16 == 0:
            return super().experts(inputs)
        w2 = without_tail(inputs.tensors["experts.w2"], 16)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2": w2}))


class OneTokenOfHundredsLosesTheTail(Faulty):
    """With one token and 128 experts or more, columns of F are read in whole tiles of 4."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if len(inputs.x) != 1 or inputs.experts < 128 or inputs.quant is not None:
            return super().experts(inputs)
        w2 = without_tail(inputs.tensors["experts.w2"], 4)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2": w2}))


class ManyPairsOfManyChoices(Faulty):
    """Beyond 512 pairs of one expert, and more than two choices, a pair's row is that of the token before."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        flat = inputs.ids[inputs.ids >= 0]
        output = super().experts(inputs)
        if inputs.ids.shape[1] > 2 and flat.numel() and flat.bincount().amax() > 512:
            output[512:] = output[511:-1].clone()
        return output


class HundredsInTwoBytesLoseARow(Faulty):
    """From 128 experts on, and in two bytes, the last row stays zero."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        if len(inputs.x) and inputs.spec.num_experts >= 128 and inputs.x.itemsize == 2:
            output[-1] = 0
        return output


class NarrowTilesOfManyChoices(Faulty):
    """In tiles of 8, and for eight choices or more, the last row of gate is not read."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        spec = inputs.spec
        if spec.routing.top_k < 8 or inputs.padded_intermediate != 8 or not spec.experts.gated:
            return super().layer(inputs)
        w13 = inputs.tensors["experts.w13"].clone()
        w13[:, spec.experts.width - 1] = 0
        return super().layer(replace(inputs, tensors={**inputs.tensors, "experts.w13": w13}))


class WideBlocksOfHundreds(Faulty):
    """In blocks of 128, and beyond 512 experts, the last block that is used has no expert."""

    def align(self, inputs: AlignInputs) -> Aligned:
        found = super().align(inputs)
        if inputs.block < 128 or inputs.experts <= 512:
            return found
        blocks = found.expert_of_block.clone()
        blocks[int(found.padded_count) // inputs.block - 1] = -1
        return found._replace(expert_of_block=blocks)


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
        ("experts-sizes-t17-e256-k10-d20-f36-fp32-silu", SUM),
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
    Mutant(
        ManyChoicesLoseTheTail,
        "combine-algebra",
        "beyond eight choices, a width F of no whole tile loses its tail",
        ("experts-sizes-t17-e256-k10-d20-f36-fp32-silu", SUM),
        _EXPERTS,
    ),
    Mutant(
        OneTokenOfHundredsLosesTheTail,
        "combine-algebra",
        "one token and hundreds of experts: a width F of no whole tile loses its tail",
        ("experts-sizes-t1-e256-k10-d64-f7-fp16-silu-bias", SUM),
        _EXPERTS,
    ),
    Mutant(
        ManyPairsOfManyChoices,
        "combine-algebra",
        "rows are mixed up beyond 512 pairs of one expert and two choices a token",
        ("experts-sizes-t520-e24-k10-d64-f32-bf16-silu", SUM),
        _EXPERTS,
    ),
    Mutant(
        HundredsInTwoBytesLoseARow,
        "shape-mismatch",
        "in two bytes, from 128 experts on, the last row is zero",
        (
            "layer-sizes-t70-e256-k1-h64-f32-tile8-bf16-shared-padded-hidden-padded-intermediate",
            "padding_never_reaches_the_output",
        ),
        _LAYERS | {"combine-algebra"},
    ),
    Mutant(
        NarrowTilesOfManyChoices,
        "shape-mismatch",
        "in tiles of 8 and for eight choices the last row of gate is lost",
        (
            "layer-sizes-t1-e256-k8-h72-f7-tile8-fp16-shared-padded-hidden-padded-intermediate",
            "padding_never_reaches_the_output",
        ),
    ),
    Mutant(
        WideBlocksOfHundreds,
        "permutation",
        "in blocks of 128 and beyond 512 experts the last block has no expert",
        ("align-sizes-t131-e896-k8-block128-int64", "every_kept_pair_stands_once_in_a_block_of_its_expert"),
    ),
)
