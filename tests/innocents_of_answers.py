"""Engines that answer in another form, or compute in another order, legitimately (see innocents.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from innocents import Accused, Innocent
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import (
    Aligned,
    AlignInputs,
    CaptureSession,
    CaptureSpec,
    ExpertMapSpec,
    ExpertsInputs,
    LayerInputs,
    Replicated,
    ReplicateInputs,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    ShardInputs,
    UpdateInputs,
)
from moe_conformance.judging.verdict import Verdict
from moe_conformance.reference_impl.capture import Capturer
from moe_conformance.reference_impl.experts import mlp


def is_plain(inputs: RouteInputs) -> bool:
    """Scores of all, K of them chosen: nothing looks at another row, or at fewer classes than there are."""
    spec = inputs.routing
    return spec.selector == "topk" and spec.capacity is None and spec.classes(0) == 0


# --- routers


class SortedById(Innocent):
    """A row's experts stand in the order of their ids."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        own = ids[:, : inputs.routing.top_k].sort(dim=1).indices
        order = torch.cat([own, torch.arange(own.shape[1], ids.shape[1]).expand(len(ids), -1)], 1)
        return Routing(ids.gather(1, order), weights.gather(1, order))


class IdsOfTwoBytes(Innocent):
    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids.to(torch.int16), weights)


class ColumnsOfOneRow(Innocent):
    """Ids and weights lie column by column in memory."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids.T.contiguous().T, weights.T.contiguous().T)


class PlainTuple(Innocent):
    """A router of a training framework: a list of a tensor of ids and one with a gradient."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return [ids, weights.requires_grad_()]  # type: ignore[return-value]


class OwnTensors(Innocent):
    """A subclass of Tensor, as wrappers of distributed and quantised tensors are."""

    class Own(Tensor):
        pass

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        return Routing(ids.as_subclass(self.Own), weights.as_subclass(self.Own))


class NaNIsLowest(Innocent):
    """NaN counts as minus infinity, so that numbers win."""

    def route(self, inputs: RouteInputs) -> Routing:
        logits = inputs.logits
        lowest = torch.finfo(logits.dtype).min
        return super().route(replace(inputs, logits=logits.where(~logits.isnan(), lowest)))


class SoftmaxOfTheChosen(Innocent):
    """A softmax that is divided by its sum is the softmax of the chosen logits."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec = inputs.routing
        usual = spec.score == "softmax" and spec.renormalize == "sum" and not spec.selection_bias and spec.groups == 1
        if is_plain(inputs) and usual and spec.select_on == "scores" and not spec.floor:
            spec = replace(spec, select_on="logits", renormalize="no", epsilon=0.0)
        return super().route(replace(inputs, routing=spec))


class NormalisesTwice(Innocent):
    """What sums to 1 may be divided by its sum."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        spec = inputs.routing
        plain = is_plain(inputs) and inputs.fused_shared is None and not spec.per_expert_scale and not spec.global_scale
        if spec.renormalize == "sum" and spec.score == "softmax" and spec.score_dtype == "float32" and plain:
            weights = weights / weights.sum(1, keepdim=True) * spec.scale
        return Routing(ids, weights.nan_to_num())


class PadsTheClasses(Innocent):
    """Lanes up to a power of two hold minus infinity; a row without a number gets the first ones."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec, (_, classes) = inputs.routing, inputs.logits.shape
        one = spec.groups == 1 and not spec.selection_bias and not spec.per_expert_scale and spec.score == "softmax"
        if not (is_plain(inputs) and one and inputs.fused_shared is None and bool(inputs.logits.isfinite().all())):
            return super().route(inputs)
        wide = F.pad(inputs.logits, (0, (1 << classes.bit_length()) - classes), value=float("-inf"))
        return super().route(replace(inputs, logits=wide))


class SharedInAnyOrder(Innocent):
    """Shared experts are the last slots, the last of them first."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if inputs.fused_shared is None:
            return Routing(ids, weights)
        own = inputs.routing.top_k
        return Routing(*(torch.cat([part[:, :own], part[:, own:].flip(1)], 1) for part in (ids, weights)))


class NamesOfItsOwn(Innocent):
    """The module that holds the router calls it gate."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        inner = super().router_module(spec)

        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = inner.module

            def forward(self, hidden: Tensor, **batch: Any) -> Any:
                return self.gate(hidden, **batch)

        return RouterHandle(Block(), inner.takes, {name: f"gate.{own}" for name, own in inner.tensors.items()})


# --- dispatch


class BlocksFromTheLast(Innocent):
    """Blocks in use stand in the order of falling experts, and the pairs of a block from the last on."""

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, blocks, count = super().align(inputs)
        used, block = int(count), inputs.block
        slots[:used], blocks[: used // block] = slots[:used].flip(0), blocks[: used // block].flip(0)
        return Aligned(slots, blocks, count)


class MoreSlotsThanNeeded(Innocent):
    """Room for the worst case, of which the end holds anything; the count is a number."""

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, blocks, count = super().align(inputs)
        used, block = int(count), inputs.block
        slots, blocks = F.pad(slots, (0, 3 * block), value=5), F.pad(blocks, (0, 3), value=2)
        slots[used:], blocks[used // block :] = 5, 2
        return Aligned(slots, blocks, used)  # type: ignore[arg-type]


class PaddingAboveThePairs(Innocent):
    """Padding is marked by a number beyond the first free one, and the count has no dim."""

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, blocks, count = super().align(inputs)
        pairs = inputs.ids.numel()
        return Aligned(slots.where(slots < pairs, pairs + 1000), blocks, count[0])


class StrangersInBlocksOfNone(Innocent):
    """Pairs of other ranks get slots, in blocks of no expert behind the others, as vLLM does."""

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, blocks, count = super().align(inputs)
        used, block = int(count), inputs.block
        if inputs.expert_map is None:
            return Aligned(slots, blocks, count)
        ids = inputs.ids.reshape(-1).long()
        known = (ids >= 0) & (ids < inputs.experts)
        others = (known & (inputs.expert_map[ids.where(known, 0)] < 0)).nonzero().flatten().int()
        more = -(-len(others) // block) * block
        own = slots.new_full((used + more,), inputs.ids.numel())
        own[:used], own[used : used + len(others)] = slots[:used], others
        of_block = torch.cat([blocks[: used // block], blocks.new_full((more // block,), -1)])
        return Aligned(own, of_block, count + more)


class MapOfEightBytes(Innocent):
    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        return super().expert_map(spec).long()


# --- experts


class ScaleInTheWeights(Innocent):
    """The scaling factor is multiplied into the routing weights."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.mlp.weight_on != "output":
            return super().experts(inputs)
        return super().experts(replace(inputs, weights=inputs.weights * inputs.output_scale, output_scale=1.0))


class RowsInTilesOf16(Innocent):
    """Rows are added up to a multiple of 16, with what memory holds, and cut off."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        rows = len(inputs.x)
        if inputs.lora is not None or not -rows % 16:
            return super().experts(inputs)
        x = torch.cat([inputs.x, inputs.x.new_empty(-rows % 16, inputs.x.shape[1])])
        ids = F.pad(inputs.ids, (0, 0, 0, -rows % 16), value=-1)
        weights = F.pad(inputs.weights, (0, 0, 0, -rows % 16))
        return super().experts(replace(inputs, x=x, ids=ids, weights=weights))[:rows]


class WeightsBeforeTheSecondMatrix(Innocent):
    """Without a bias, a weight of the output may be multiplied into what enters w2."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        spec = inputs.mlp
        linear = spec.weight_on == "output" and not spec.bias and not spec.output_norm and inputs.quant is None
        if linear and inputs.lora is None and inputs.x.dtype == torch.float32:
            inputs = replace(inputs, mlp=replace(spec, weight_on="w2_input"))
        return super().experts(inputs)


class IdleExpertsAreLeftOut(Innocent):
    """Only the matrices of experts that a token chose are on the device."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is not None or inputs.identity_experts or inputs.lora is not None or inputs.native_ids:
            return super().experts(inputs)
        chosen, ids = inputs.ids.long().unique(return_inverse=True)
        less = int((chosen < 0).any())
        held = chosen[less:]
        if not len(held):
            return torch.zeros_like(inputs.x)
        tensors = {n: t if n.endswith("output_norm") else t[held] for n, t in inputs.tensors.items()}
        return super().experts(replace(inputs, ids=ids.view(inputs.ids.shape) - less, tensors=tensors))


class OnARankOfItsOwn(Innocent):
    """Without a map it makes one: a single rank that has all experts, the last first."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is not None or inputs.lora is not None:
            return super().experts(inputs)
        count = inputs.experts
        turned = {n: t if n.endswith("output_norm") else t.flip(0) for n, t in inputs.tensors.items()}
        there = torch.arange(count - 1, -1, -1, dtype=torch.int32)
        return super().experts(replace(inputs, tensors=turned, expert_map=there))


# --- layers and ranks


class SharedInHalves(Innocent):
    """The shared expert is two of half its width, added to the routed sum one after the other."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        shared = inputs.spec.shared
        plain = shared is not None and not shared.gate and not shared.weighted and shared.combine == "sum"
        if shared is None or not plain or shared.mlp.bias or inputs.x.dtype != torch.float32 or shared.mlp.width % 2:
            return super().layer(inputs)
        half, w2 = replace(shared.mlp, width=shared.mlp.width // 2), inputs.tensors["shared.w2"].chunk(2, 1)
        first = "shared.w13" if half.gated else "shared.w1"
        parts = inputs.tensors[first].chunk(4 if half.gated else 2)
        output = super().layer(replace(inputs, spec=replace(inputs.spec, shared=None)))
        for i in range(2):
            own = {first: torch.cat(parts[i::2]), "shared.w2": w2[i]}
            output = output + mlp(inputs.x, half, own, "shared")
        return output


class SharedOnTheFirstRank(Innocent):
    """One rank has the whole shared expert, the others nothing of it."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        output = super().shard(replace(inputs, shared=None, shared_tensors={}))
        if inputs.shared is None or inputs.ep_rank or inputs.tp_rank:
            return output
        return output + mlp(inputs.whole.x, inputs.shared, inputs.shared_tensors, "shared")


class TheLastCopy(Innocent):
    """Of several copies of an expert each pair takes the last one, and load is counted in four bytes."""

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        _, load = super().replicate(inputs)
        last = torch.zeros(inputs.experts, dtype=torch.int64)
        last[inputs.physical_to_logical] = torch.arange(len(inputs.physical_to_logical))
        return Replicated(torch.where(inputs.ids < 0, -1, last[inputs.ids.long().clamp(min=0)]).int(), load.int())


# --- captures


class RecordOfEightBytes(Innocent):
    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        class Session(Capturer):
            def read(self, num_tokens: int) -> Tensor:
                return super().read(num_tokens).long()

        return Session(spec)


class ErrorsOfItsOwn(Innocent):
    """What it refuses, it refuses in exceptions of its own, and rows beyond the step in Python's."""

    class Refused(Exception):
        pass

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        refused = self.Refused

        class Session(Capturer):
            def capture(self, *arguments: Any) -> None:
                try:
                    super().capture(*arguments)
                except ValueError as error:
                    raise refused(str(error)) from None

            def read(self, num_tokens: int) -> Tensor:
                try:
                    return super().read(num_tokens)
                except ValueError as error:
                    raise IndexError(str(error)) from None

        return Session(spec)


# --- checkpoints and updates


class LoadsMoreThanAsked(Innocent):
    """Tensors that it has beside, and weights that lie transposed in its memory."""

    def load(self, folder: Path) -> dict[str, Tensor]:
        found = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in super().load(folder).items()}
        return found | {"layers.0.attention.weight": torch.zeros(3)}


class AnswersAtOnce(Innocent):
    """Outputs of all pushes are one tensor, of which each is a part."""

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        return torch.stack(list(super().update(inputs))).unbind()


class OwnAnswer(NamedTuple):
    """An engine's own tuple, whose fields have names of its own."""

    topk_ids: Tensor
    topk_weights: Tensor


class FieldsOfItsOwn(Innocent):
    def route(self, inputs: RouteInputs) -> Routing:
        return OwnAnswer(*super().route(inputs))  # type: ignore[return-value]


_METHOD, _UNIQUE = "ids_and_weights_are_those_of_the_method", "ids_are_unique_and_in_range_for_any_row"
_SHARED, _WRITTEN = "shared_experts_are_the_last_slots", "every_element_is_written"
_BLOCKS, _COUNT = "every_kept_pair_stands_once_in_a_block_of_its_expert", "padded_count_is_exact"
_SUM, _MANY = "outputs_are_weighed_and_summed", "any_number_of_tokens_is_computed"
_NO_EXPERT, _LAYER = "pairs_of_no_expert_here_add_nothing", "each_part_of_a_layer_counts_once"
_NARROW, _STORED = "every_expert_id_survives_storage", "stored_weights_take_their_own_scales"

ACCUSED = tuple(
    Accused(engine, clause, (case, check), Verdict.PASS)
    for engine, clause, case, check in (
        (SortedById, "routing.method", "route-renorm-e128-k8-t7-fp32-distinct", _METHOD),
        (IdsOfTwoBytes, "outputs.written", "route-biased-e896-k22-t3-fp32-fine", _WRITTEN),
        (ColumnsOfOneRow, "outputs.written", "route-renorm-e7-k7-t1-fp32-fine", _WRITTEN),
        (PlainTuple, "routing.method", "route-plain-e128-k8-t63-fp32-distinct", _METHOD),
        (FieldsOfItsOwn, "routing.method", "route-plain-e128-k8-t63-fp32-distinct", _METHOD),
        (OwnTensors, "routing.method", "route-gemma4-e128-k8-t7-bf16-distinct", _METHOD),
        (NaNIsLowest, "route.unique-ids", "route-gemma4-e128-k8-t23-fp32-not-numbers", _UNIQUE),
        (SoftmaxOfTheChosen, "routing.method", "route-renorm-e128-k8-t7-fp32-distinct", _METHOD),
        (NormalisesTwice, "routing.method", "route-renorm-e128-k8-t7-fp32-distinct", _METHOD),
        (PadsTheClasses, "routing.method", "route-renorm-e60-k4-t63-bf16-distinct", _METHOD),
        (SharedInAnyOrder, "route.fused-shared", "route-deepseek-v3-fused-shared-share", _SHARED),
        (
            NamesOfItsOwn,
            "routing.method",
            "router-plain-e128-k8-fp32",
            "a_router_chooses_and_weighs_by_its_method",
        ),
        (BlocksFromTheLast, "align.whole-blocks", "align-e60-k6", _BLOCKS),
        (MoreSlotsThanNeeded, "align.whole-blocks", "align-e60-k6", _COUNT),
        (PaddingAboveThePairs, "align.whole-blocks", "align-e60-k6", _BLOCKS),
        (StrangersInBlocksOfNone, "align.no-expert", "align-map-scattered", _COUNT),
        (MapOfEightBytes, "expert-map.one-place", "expert-map-contiguous-11-on-3", "every_expert_has_one_place"),
        (ScaleInTheWeights, "experts.combine", "experts-scale", _SUM),
        (RowsInTilesOf16, "batches.any-size", "experts-131-tokens", _MANY),
        (WeightsBeforeTheSecondMatrix, "experts.combine", "experts-scale", _SUM),
        (IdleExpertsAreLeftOut, "experts.stored-weights", "experts-stored-fp8-block", _STORED),
        (OnARankOfItsOwn, "experts.no-expert", "experts-dropped", _NO_EXPERT),
        (SharedInHalves, "layer.sum", "layer-tiny-shared", _LAYER),
        (SharedOnTheFirstRank, "shard.shared", "shard-shared-ep3", "shared_output_is_added_once"),
        (TheLastCopy, "replicate.choice", "replicate-choice-two-copies", "each_pair_goes_to_a_copy_of_its_expert"),
        (RecordOfEightBytes, "capture.narrow", "capture-narrow-e256", _NARROW),
        (ErrorsOfItsOwn, "capture.bounds", "capture-layer-minus-one", "layer_ids_out_of_range_are_refused"),
        (
            LoadsMoreThanAsked,
            "load.whole",
            "load-gemma4-packed-one-file",
            "a_load_gives_every_tensor_of_the_checkpoint",
        ),
        (
            AnswersAtOnce,
            "update.current-values",
            "update-qwen3-moe-once",
            "a_block_computes_with_what_was_pushed_last",
        ),
    )
)
