"""Engines that lose, double or misplace pairs on their way into the blocks of their experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import Aligned, AlignInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.parallel.expert_map import held_experts


class FaultyIds(Faulty):
    """Right, but for what it takes the ids to be."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        """[T, K]; the reference raises for those out of range."""
        raise NotImplementedError

    def align(self, inputs: AlignInputs) -> Aligned:
        return super().align(replace(inputs, ids=self.seen(inputs)))


class FaultyBlocks(Faulty):
    """Sorts rightly, and spoils the blocks in use; it returns no others."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """pairs: [n, block], the pairs of each block, T K for padding. experts: [n]."""
        raise NotImplementedError

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, experts, count = super().align(inputs)
        pairs = slots[:count].reshape(-1, inputs.block)
        pairs, experts = self.blocks(inputs, pairs, experts[: len(pairs)])
        return Aligned(pairs.flatten(), experts, torch.tensor([pairs.numel()], dtype=torch.int32))


def _with_empty_blocks(inputs: AlignInputs, pairs: Tensor, experts: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """more: [m], the expert of each further block, which holds only padding."""
    empty = pairs.new_full((len(more), inputs.block), inputs.ids.numel())
    order = torch.cat([experts, more]).argsort(stable=True)
    return torch.cat([pairs, empty])[order], torch.cat([experts, more])[order].int()


class TailCountsTowardsExpertZero(FaultyBlocks):
    """Ids are counted 128 at a time, and the lanes behind the last one read as 0."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        held, total = (pairs[experts == 0] < inputs.ids.numel()).sum(), inputs.ids.numel()
        more = -(-(held + -total % 128) // inputs.block) - (experts == 0).sum()
        return _with_empty_blocks(inputs, pairs, experts, experts.new_zeros(int(more)))


class FullBlocksGetOneMore(FaultyBlocks):
    """count // block + 1 blocks an expert."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        last = experts != torch.cat([experts[1:], experts.new_tensor([-1])])[: len(experts)]
        full = (pairs < inputs.ids.numel()).all(1)
        return _with_empty_blocks(inputs, pairs, experts, experts[last & full])


class EmptyExpertsGetABlock(FaultyBlocks):
    """At least one block an expert."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        held = inputs.experts if inputs.expert_map is None else int((inputs.expert_map >= 0).sum())
        idle = torch.tensor([expert for expert in range(held) if expert not in experts.tolist()], dtype=torch.int32)
        return _with_empty_blocks(inputs, pairs, experts, idle)


class InverseInTheWrongSpace(FaultyBlocks):
    """The place of each pair is written where the pair at each place is read."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        held = pairs < inputs.ids.numel()
        return pairs.masked_scatter(held, pairs[held].argsort().int()), experts


class TokensForPairs(FaultyBlocks):
    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        total, K = inputs.ids.numel(), max(inputs.ids.shape[1], 1)
        return torch.where(pairs < total, pairs // K, pairs), experts


class PairsByColumn(FaultyBlocks):
    """k T + t."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        T, K = inputs.ids.shape
        return torch.where(pairs < T * K, pairs % K * T + pairs // K, pairs), experts


class PaddingIsPairZero(FaultyBlocks):
    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        return pairs % max(inputs.ids.numel(), 1), experts


class PaddingIsLeftUnwritten(FaultyBlocks):
    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        held = pairs < inputs.ids.numel()
        return torch.empty_like(pairs).masked_scatter(held, pairs[held]), experts


class LastBlockIsTheNextExperts(FaultyBlocks):
    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.arange(len(experts)) == len(experts) - 1
        return pairs, experts + last.int()


class BoundariesBelongToThePreviousExpert(FaultyBlocks):
    """A block that starts where an expert's slots end is taken for one of its own."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        return pairs, torch.cat([experts[:1], experts[:-1]])[: len(experts)]


class BlocksNameGlobalExperts(FaultyBlocks):
    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.expert_map is None:
            return pairs, experts
        return pairs, held_experts(inputs.expert_map)[experts].int()


class HotExpertsOverflow(FaultyBlocks):
    """An expert takes 128 pairs; its further slots are padding."""

    def blocks(self, inputs: AlignInputs, pairs: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.searchsorted(experts, experts)  # of the blocks of the same expert
        place = (torch.arange(len(experts)) - first)[:, None] * inputs.block + torch.arange(inputs.block)
        return pairs.where(place < 128, inputs.ids.numel()), experts


class CountIsNotRounded(Faulty):
    """padded_count counts pairs, not slots."""

    def align(self, inputs: AlignInputs) -> Aligned:
        aligned = super().align(inputs)
        return aligned._replace(padded_count=(aligned.slot_to_pair < inputs.ids.numel()).sum()[None].int())


class CountNeverFalls(Faulty):
    """The slots in use are as many as they ever were."""

    def __init__(self) -> None:
        self.most = torch.zeros(1, dtype=torch.int32)

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, experts, count = super().align(inputs)
        self.most = torch.maximum(self.most, count)
        more = int(self.most)
        slots = torch.cat([slots, slots.new_full((more,), inputs.ids.numel())])
        return Aligned(slots, torch.cat([experts.clamp(min=0), experts.new_zeros(more)]), self.most)


class WritesBetweenRows(Faulty):
    """Ids are left as they are, memory behind each row is not."""

    def align(self, inputs: AlignInputs) -> Aligned:
        memory = inputs.ids._base
        if memory is not None and memory.numel() > inputs.ids.numel():
            memory.numpy()[:, -1] = 0  # behind torch's back, as a kernel does
        return super().align(inputs)


class MinusOneIsTheLastExpert(FaultyIds):
    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.masked_fill(inputs.ids == -1, inputs.experts - 1)


class IdsBelowMinusOneWrapAround(FaultyIds):
    def seen(self, inputs: AlignInputs) -> Tensor:
        return torch.where(inputs.ids < -1, inputs.ids % inputs.experts, inputs.ids)


class IdsBeyondTheLastWrapAround(FaultyIds):
    def seen(self, inputs: AlignInputs) -> Tensor:
        return torch.where(inputs.ids >= inputs.experts, inputs.ids % inputs.experts, inputs.ids)


class IdsCutToInt32(FaultyIds):
    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.int()


class IdsCutToBytes(FaultyIds):
    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.where(inputs.ids < 0, inputs.ids & 255)


class OnlyTheFirst512Experts(FaultyIds):
    """Pairs are counted by 512 threads, one an expert."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.where(inputs.ids < 512, -1)


class NineBitsOfAnId(FaultyIds):
    """Sort keys hold nine bits of an id."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.where(inputs.ids < 0, inputs.ids & 511)


class Int64ReadAsInt32(FaultyIds):
    """Twice as many words as there are pairs, and the first half of them is read."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.contiguous().view(torch.int32).flatten()[: inputs.ids.numel()].reshape(inputs.ids.shape)


class LastOddTokenIsLost(FaultyIds):
    """Tokens are read two at a time."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        even = torch.arange(len(inputs.ids))[:, None] < len(inputs.ids) // 2 * 2
        return inputs.ids.where(even, -1)


class OnlyOneLaunch(FaultyIds):
    """1024 threads, one pair each."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        return inputs.ids.where(torch.arange(inputs.ids.numel()).reshape(inputs.ids.shape) < 1024, -1)


class LocalIdsAreLookedUp(FaultyIds):
    """The map is applied to what came out of it."""

    def seen(self, inputs: AlignInputs) -> Tensor:
        if inputs.expert_map is None:
            return inputs.ids
        local = inputs.expert_map[inputs.ids.clamp(0, inputs.experts - 1).long()]
        return torch.where((inputs.ids >= 0) & (local >= 0), local, -1)


class PaddedExpertsTakePairs(Faulty):
    """Experts are padded to a power of two, and an id that names one of those is as good as any."""

    def align(self, inputs: AlignInputs) -> Aligned:
        experts, expert_map = 1 << (inputs.experts - 1).bit_length(), inputs.expert_map
        if expert_map is not None:
            expert_map = torch.nn.functional.pad(expert_map, (0, experts - inputs.experts), value=-1)
        return super().align(replace(inputs, experts=experts, expert_map=expert_map))


class DroppedPairsTakeRoom(Faulty):
    """Where pairs are dropped, an empty block of the first expert comes behind the others."""

    def align(self, inputs: AlignInputs) -> Aligned:
        slots, experts, count = super().align(inputs)
        if not (inputs.ids == -1).any():
            return Aligned(slots, experts, count)
        experts = experts.clone()
        experts[int(count) // inputs.block] = 0
        return Aligned(slots, experts, count + inputs.block)


class SmallBatchesLoseTheirLast(Faulty):
    """The kernel for a few pairs stops one short."""

    def align(self, inputs: AlignInputs) -> Aligned:
        if inputs.expert_map is not None or inputs.ids.numel() > 32:
            return super().align(inputs)
        ids = inputs.ids.clone()
        ids[-1:, -1] = -1
        return super().align(replace(inputs, ids=ids))


class SmallBatchesHaveNoMap(Faulty):
    """The kernel for a few pairs takes those of other ranks for the first expert's."""

    def align(self, inputs: AlignInputs) -> Aligned:
        if inputs.expert_map is None or inputs.ids.numel() > 32:
            return super().align(inputs)
        return super().align(replace(inputs, expert_map=inputs.expert_map.clamp(min=0)))


_PLACE = "every_kept_pair_stands_once_in_a_block_of_its_expert"
_COUNT = "padded_count_is_exact"
_NONE = "ids_that_name_no_expert_never_appear"
_RANGE = "ids_out_of_range_are_refused_or_left_out"
_AGAIN = "earlier_calls_change_nothing"
_SPELLED = "blocks_of_a_small_batch"
_MOVED = "permuted_tokens_keep_their_experts"

MUTANTS = tuple(
    Mutant(engine, "permutation", fault, (f"align-{case}", check), frozenset({"unwritten-output"}))
    for engine, fault, case, check in (
        (
            TailCountsTowardsExpertZero,
            "lanes behind the last id are counted for expert 0 (Triton-distributed#181)",
            "block-1",
            _COUNT,
        ),
        (FullBlocksGetOneMore, "a count that fills its blocks gets one more", "no-padding", _COUNT),
        (EmptyExpertsGetABlock, "an expert without pairs gets a block", "unpicked", _COUNT),
        (InverseInTheWrongSpace, "the permutation stands where its inverse must (TileOPs#640)", "e60-k6", _PLACE),
        (TokensForPairs, "slots name tokens", "e60-k6", _PLACE),
        (PairsByColumn, "pairs are numbered column by column", "e60-k6", _PLACE),
        (PaddingIsPairZero, "padding is marked 0", "e60-k6", _PLACE),
        (LastBlockIsTheNextExperts, "the last block's expert is off by one", "e60-k6", _PLACE),
        (BoundariesBelongToThePreviousExpert, "first blocks name the expert before", "no-padding", _PLACE),
        (BlocksNameGlobalExperts, "blocks name global experts", "map-last-ranks", _PLACE),
        (HotExpertsOverflow, "an expert takes no more than 128 pairs", "all-on-one", _PLACE),
        (CountIsNotRounded, "the padded count is not padded", "e60-k6", _COUNT),
        (CountNeverFalls, "the slots of a larger batch stay in use", "earlier-calls-e60-k6", _AGAIN),
        (WritesBetweenRows, "memory between the rows of ids is written", "earlier-calls-rows-apart", _AGAIN),
        (MinusOneIsTheLastExpert, "-1 wraps to the last expert (vllm#46408)", "dropped", _NONE),
        (IdsBelowMinusOneWrapAround, "ids below -1 count from the last expert", "out-of-range-minus-2", _RANGE),
        (IdsBeyondTheLastWrapAround, "ids from E on begin again", "out-of-range-e", _RANGE),
        (IdsCutToInt32, "int64 ids are cut to 32 bits", "out-of-range-beyond-int32", _RANGE),
        (IdsCutToBytes, "ids are kept in a byte", "all-on-last-of-257", _PLACE),
        (
            OnlyTheFirst512Experts,
            "pairs of experts from the 512th on are not counted",
            "sizes-t131-e896-k8-block128-int64",
            _COUNT,
        ),
        (NineBitsOfAnId, "sort keys keep nine bits of an id", "all-on-last-of-896", _PLACE),
        (Int64ReadAsInt32, "int64 ids are read as int32", "sizes-t131-e5-k5-block1-int64", _PLACE),
        (LastOddTokenIsLost, "the last of an odd number of tokens is lost", "permuted-e60-k6", _MOVED),
        (OnlyOneLaunch, "pairs from the 1024th on are not seen", "sizes-t131-e60-k8-block8-int32", _PLACE),
        (LocalIdsAreLookedUp, "the map is looked up with local ids", "map-last-ranks", _PLACE),
        (DroppedPairsTakeRoom, "slots are counted for dropped pairs", "dropped", _COUNT),
        (SmallBatchesLoseTheirLast, "the last of a few pairs is lost", "spelled-out", _SPELLED),
        (SmallBatchesHaveNoMap, "a few pairs are placed without the map", "spelled-out-map", _SPELLED),
        (PaddedExpertsTakePairs, "ids of padded experts are taken", "out-of-range-63", _RANGE),
    )
)
