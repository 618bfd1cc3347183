"""Engines that take a layout from a shape, or lose tokens at the borders of chunks and tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import (
    ExpertsInputs,
    LayerInputs,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    ShardInputs,
)
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.router import Router, build_router


def other_way(tensor: Tensor) -> Tensor:
    """The last two dims as a reader takes them who has the matrix for its transpose."""
    return tensor.reshape(*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]).mT.contiguous()


# --- layouts that are guessed


def by_larger_dim(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """w13 read as [E, D, 2F] where its last dim is the larger one, as a loader does that guesses the layout."""
    w13 = tensors.get("experts.w13")
    if w13 is None or w13.ndim != 3 or not w13.is_floating_point() or w13.shape[1] >= w13.shape[2]:
        return dict(tensors)
    return {**tensors, "experts.w13": other_way(w13)}


class GuessesOrientation(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(replace(inputs, tensors=by_larger_dim(inputs.tensors)))


class GuessesOrientationOfDown(Faulty):
    """w2 is read as [E, F, D] where 2F is smaller than D."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        w2 = inputs.tensors["experts.w2"]
        if inputs.quant is not None or not inputs.mlp.gated or 2 * w2.shape[2] >= w2.shape[1]:
            return super().experts(inputs)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2": other_way(w2)}))


class LayerGuessesOrientation(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        return super().layer(replace(inputs, tensors=by_larger_dim(inputs.tensors)))


class SquareIsTransposed(Faulty):
    """Whether w2 was transposed already is told from its shape, which says nothing where F = D; in two bytes alone."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        w2 = inputs.tensors["experts.w2"]
        if inputs.quant is not None or w2.shape[1] != w2.shape[2] or w2.itemsize != 2:
            return super().experts(inputs)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2": w2.mT}))


class BiasOfAsManyExperts(Faulty):
    """b2 [E, D] is transposed where it is square."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        b2 = inputs.tensors.get("experts.b2")
        if b2 is None or b2.shape[0] != b2.shape[1]:
            return super().experts(inputs)
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.b2": b2.T}))


class LatentIsSquare(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        entry = inputs.tensors.get("latent.in")
        if entry is None or entry.shape[0] != entry.shape[1]:
            return super().layer(inputs)
        return super().layer(replace(inputs, tensors={**inputs.tensors, "latent.in": entry.T}))


class CutsTheEqualDim(Faulty):
    """Tensor-parallel ranks cut w13 along its last dim where both are as long."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        w13 = inputs.whole.tensors.get("experts.w13")
        if inputs.tp_size == 1 or w13 is None or w13.shape[1] != w13.shape[2]:
            return super().shard(inputs)
        whole = replace(inputs.whole, tensors={**inputs.whole.tensors, "experts.w13": w13.mT})
        return super().shard(replace(inputs, whole=whole))


class SquareProjection(Faulty):
    def router_module(self, spec: RouterSpec) -> RouterHandle:
        handle = build_router(spec)
        if spec.num_experts == spec.hidden_size:
            handle.module.__class__ = _Transposed
        return handle


class _Transposed(Router):
    def forward(self, hidden: Tensor, *, state: Tensor | None = None, **batch: object) -> tuple[Tensor, Tensor]:
        kept = self.proj.data
        self.proj.data = kept.T
        try:
            return super().forward(hidden, state=state, **batch)
        finally:
            self.proj.data = kept


# --- borders of chunks and tiles


class FiveHundredAndTwelvePairs(Faulty):
    """An expert's list has room for 512 pairs, and those that come later are dropped."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        flat = inputs.ids.flatten()
        place = (flat[:, None] == flat[None]).tril().sum(-1).view_as(inputs.ids)
        return super().experts(replace(inputs, ids=inputs.ids.masked_fill(place > 512, -1)))


class SmallLastChunk(Faulty):
    """vllm#20392: a last chunk of one or two tokens, behind whole ones of 64, takes the workspace of a whole chunk."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output, rows = super().experts(inputs), len(inputs.x)
        if rows > 64 and rows % 64 in (1, 2) and inputs.expert_map is None:
            output[rows - rows % 64 :] = output[: rows % 64].clone()
        return output


class WholeChunkEndsEarly(Faulty):
    """In bfloat16, from 256 tokens on, the first token of a chunk is taken for the last of the one before."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        output = super().layer(inputs)
        if len(output) > 256 and output.dtype == torch.bfloat16:
            output[256] = output[255].clone()
        return output


class IdsOfTheFirstChunk(Faulty):
    """sglang#3679: on a rank of several, ids are not moved on with the second chunk of 128 tokens."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        ids = inputs.whole.ids
        if len(ids) <= 128 or inputs.ep_size == 1:
            return super().shard(inputs)
        again = torch.cat([ids[:128], ids[: len(ids) - 128]])
        return super().shard(replace(inputs, whole=replace(inputs.whole, ids=again)))


class RowBehindTheTiles(Faulty):
    """With one row more than whole tiles of 64 the last is not looked at where there is a selection bias."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if len(ids) > 64 and len(ids) % 64 == 1 and inputs.routing.selection_bias:
            ids[-1], weights[-1] = ids[-2].clone(), weights[-2].clone()
        return Routing(ids, weights)


_LAYOUT = "no_shape_decides_a_layout"
_MANY = "any_number_of_tokens_is_computed"
# Narrow experts, wide ones and long batches are in cases of everything that experts do.
_SUMS = frozenset(
    {"activation", "combine-algebra", "expert-lora", "expert-map", "dtype-stride-arguments", "determinism-state"}
    | {"batch-invariance"}
)

MUTANTS = tuple(
    Mutant(engine, bug_class, fault, (case, check), _SUMS | frozenset(also))
    for bug_class, check, rows in (
        (
            "weight-orientation",
            _LAYOUT,
            (
                (GuessesOrientation, "w13 is transposed where 2F < D", "experts-2f-below-d-silu-bf16", ("chunking",)),
                (
                    GuessesOrientationOfDown,
                    "w2 is transposed where 2F < D",
                    "experts-2f-below-d-silu-bf16",
                    ("chunking",),
                ),
                (
                    LayerGuessesOrientation,
                    "w13 is transposed where 2F < H",
                    "layer-oriented-2f-below-h-plain",
                    ("shape-mismatch", "chunking"),
                ),
                (SquareIsTransposed, "w2 is transposed where F = D, in bfloat16", "experts-f-is-d-silu-bf16", ()),
                (BiasOfAsManyExperts, "b2 is transposed where E = D", "experts-e-is-d-silu-bias-fp32", ()),
                (LatentIsSquare, "latent.in is transposed where D = H", "layer-oriented-d-is-h-latent", ()),
                (CutsTheEqualDim, "w13 is cut along the wrong dim where 2F = D", "shard-tp2-equal-dims", ()),
                (
                    SquareProjection,
                    "the projection is transposed where E = H",
                    "router-renorm-square-fp32",
                    ("closure-capture",),
                ),
            ),
        ),
        (
            "chunking",
            _MANY,
            (
                (FiveHundredAndTwelvePairs, "an expert takes 512 pairs", "experts-hot", ()),
                (SmallLastChunk, "a small last chunk is computed wrongly", "experts-129-tokens", ()),
                (WholeChunkEndsEarly, "the 257th token is the 256th", "layer-257-tokens-plain", ()),
                (IdsOfTheFirstChunk, "the second chunk has the ids of the first", "shard-ep3-129-tokens", ()),
                (
                    RowBehindTheTiles,
                    "a last row by itself is the one before",
                    "route-deepseek-v3-e96-k6-t129-bf16-fine",
                    (),
                ),
            ),
        ),
    )
    for engine, fault, case, also in rows
)
