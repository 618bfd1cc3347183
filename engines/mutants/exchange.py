"""Exchanges that lose a row, its order, its ids or its weight on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import Arrived, Exchanged, ExchangeInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

SUMS = "each_rank_gets_its_own_tokens_sums"
COUNTS = "any_rank_may_have_any_number_of_tokens"
ARRIVALS = "experts_are_given_the_rows_that_chose_them"
SHARED = "shared_output_is_in_each_row_once"
STATE = "exchanges_before_leave_no_trace"
Ranks = Sequence[ExchangeInputs]


def rows_of(tensor: Tensor, count: int) -> Tensor:
    """The first rows, and zeros where there are fewer."""
    kept = tensor[:count]
    return torch.cat([kept, kept.new_zeros(count - len(kept), *kept.shape[1:])])


def without(inputs: ExchangeInputs, gone: Tensor) -> ExchangeInputs:
    """The same without these pairs [T, K]."""
    return replace(inputs, ids=inputs.ids.masked_fill(gone, -1))


class OrderOfExpertsIsKept(Faulty):
    """torchtitan#1237: the rows that come back stand as they were sent, sorted by expert."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        found = super().exchange(ranks)
        return [
            got._replace(output=got.output[rank.ids[:, 0].argsort()]) for rank, got in zip(ranks, found, strict=True)
        ]


class CombinesByIdsThatArrived(Faulty):
    """vllm#52639: what arrived from the rank before is in the variable of one's own ids, where it is as long."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        before = [ranks[number - 1] for number in range(len(ranks))]
        return super().exchange(
            [
                replace(rank, weights=other.weights) if rank.weights.shape == other.weights.shape else rank
                for rank, other in zip(ranks, before, strict=True)
            ]
        )


class LocalIdsRise(Faulty):
    """A rank counts its experts in the order of their global ids, whatever the map says."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        held = ranks[0].maps >= 0
        rising = (held.cumsum(1) - 1).masked_fill(~held, -1).to(ranks[0].maps.dtype)
        return super().exchange([replace(rank, maps=rising) for rank in ranks])


class EqualRowsAreSentOnce(Faulty):
    """Rows with the same values are taken for copies of one row on its way to several experts."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange([self.once(rank) for rank in ranks])

    def once(self, rank: ExchangeInputs) -> ExchangeInputs:
        same = (rank.x[:, None] == rank.x[None]).all(-1)
        return without(rank, (same.tril(-1).any(-1))[:, None].expand_as(rank.ids))


class OneExpertOfARank(Faulty):
    """A token that has several experts on a rank is computed by the first of them, if the rank gets all pairs."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange([self.first(rank) for rank in ranks])

    def first(self, rank: ExchangeInputs) -> ExchangeInputs:
        owners = (rank.maps >= 0).int().argmax(0)[rank.ids.clamp(min=0)]
        if len(owners.unique()) > 1:
            return rank
        return without(rank, torch.arange(rank.ids.shape[1]).expand_as(rank.ids) > 0)


class AnIdleRankHasNoTokens(Faulty):
    """sgl-kernel-npu#69: a rank whose experts get nothing leaves, and takes its own tokens' outputs for zeros."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        ids = torch.cat([rank.ids.flatten() for rank in ranks]).unique()
        ids = ids[ids >= 0]
        found = []
        for rank, got in zip(ranks, super().exchange(ranks), strict=True):
            serves = bool((rank.maps[rank.rank][ids] >= 0).any())
            found.append(got if serves else got._replace(output=torch.zeros_like(got.output)))
        return found


class CountOfTheFirstRank(Faulty):
    """vllm#38999: every rank receives as many rows as the first one has."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        count, found = len(ranks[0].x), super().exchange(ranks)
        return [got._replace(output=rows_of(got.output[:count], len(got.output))) for got in found]


class NoTokensIsOneRow(Faulty):
    """vllm#51984: a rank without tokens runs with a row of padding, to keep step with the others, and returns it."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return [got._replace(output=rows_of(got.output, max(1, len(got.output)))) for got in super().exchange(ranks)]


class NoTokensNoService(Faulty):
    """vllm#51984: a rank without tokens skips the step, and what the others sent to its experts comes back as zeros."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        if not any(len(rank.x) for rank in ranks):
            return super().exchange(ranks)
        idle = torch.stack([rank.maps[rank.rank] >= 0 for rank in ranks if not len(rank.x)] or [ranks[0].maps[0] < -1])
        served = ~idle.any(0)
        return super().exchange([without(rank, ~served[rank.ids.clamp(min=0)]) for rank in ranks])


class NoExpertIsExpertZero(Faulty):
    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange([replace(rank, ids=rank.ids.clamp(min=0)) for rank in ranks])


class NoExpertTravels(Faulty):
    """A pair without an expert is sent to the first one, and adds 0."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange(
            [
                replace(rank, ids=rank.ids.clamp(min=0), weights=rank.weights.masked_fill(rank.ids < 0, 0))
                for rank in ranks
            ]
        )


class PaddedArrivals(Faulty):
    """What arrives is padded to an even number of rows, and the padding is given to the first expert."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return [got._replace(arrived=self.padded(got.arrived)) for got in super().exchange(ranks) if got.arrived]

    def padded(self, arrived: Arrived) -> Arrived:
        count = len(arrived.rows) + len(arrived.rows) % 2
        return Arrived(*(rows_of(tensor, count) for tensor in arrived))


class NarrowArrivals(Faulty):
    """Rows travel in bfloat16."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange([replace(rank, x=rank.x.bfloat16().to(rank.x.dtype)) for rank in ranks])


class IdsOfTheNextRow(Faulty):
    """torchtitan#1237: ids are sorted by expert once more than the rows beside them; shown in what is reported."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return [got._replace(arrived=self.turned(got.arrived)) for got in super().exchange(ranks) if got.arrived]

    def turned(self, arrived: Arrived) -> Arrived:
        return arrived._replace(ids=arrived.ids.roll(1, 0)) if len(arrived.ids) > 1 else arrived


class SharedOfEveryRank(Faulty):
    """sglang#35535: every rank has the whole shared expert, and what they make of a row is summed."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        found = super().exchange(ranks)
        alone = super().exchange([replace(rank, shared=None, shared_tensors={}) for rank in ranks])
        return [
            got._replace(output=got.output + (len(ranks) - 1) * (got.output - routed.output))
            for got, routed in zip(found, alone, strict=True)
        ]


class SharedOfTheFirst(Faulty):
    """The first rank alone has the shared expert."""

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        return super().exchange(
            [replace(rank, shared=None, shared_tensors={}) if rank.rank else rank for rank in ranks]
        )


class CountsOfTheFirstExchange(Faulty):
    """A buffer is made at the first exchange, as large as that one takes."""

    size: int | None = None

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        found = super().exchange(ranks)
        size = self.size = self.size or max(len(rank.x) for rank in ranks)
        return [got._replace(output=rows_of(got.output[:size], len(got.output))) for got in found]


class OutputOfTheLast(Faulty):
    """Outputs are added to what the buffer holds of the exchange before, unless that is shorter."""

    before: Sequence[Tensor] = ()

    def exchange(self, ranks: Ranks) -> Sequence[Exchanged]:
        found = super().exchange(ranks)
        buffer, self.before = self.before, [got.output for got in found]
        if len(buffer) != len(found) or any(
            len(old) < len(got.output) or old.dtype != got.output.dtype for old, got in zip(buffer, found, strict=True)
        ):
            return found
        return [
            got._replace(output=got.output + old[: len(got.output)]) for got, old in zip(found, buffer, strict=True)
        ]


ALL = frozenset({"expert-map", "dp-assertions", "permutation", "shared-experts", "determinism-state"})

MUTANTS = tuple(
    Mutant(engine, bug_class, fault, (f"exchange-{case}", check), also=ALL)
    for engine, bug_class, fault, case, check in (
        (OrderOfExpertsIsKept, "expert-map", "rows come back in the order of experts", "ep3", SUMS),
        (CombinesByIdsThatArrived, "expert-map", "weights that arrived are taken for one's own", "scattered", SUMS),
        (LocalIdsRise, "expert-map", "local ids are counted, not looked up", "scattered", SUMS),
        (EqualRowsAreSentOnce, "expert-map", "of equal rows one is sent", "repeated-rows", SUMS),
        (
            OneExpertOfARank,
            "expert-map",
            "one expert for a token whose experts are all on a rank",
            "all-to-one-rank",
            SUMS,
        ),
        (AnIdleRankHasNoTokens, "expert-map", "a rank that nobody chose gets nothing", "unpicked-rank", SUMS),
        (NoExpertIsExpertZero, "expert-map", "a pair without an expert is the first one's", "dropped", SUMS),
        (CountOfTheFirstRank, "dp-assertions", "rows beyond the first rank's number are lost", "uneven", COUNTS),
        (NoTokensIsOneRow, "dp-assertions", "no tokens are a row of padding", "no-tokens", COUNTS),
        (NoTokensNoService, "dp-assertions", "a rank without tokens serves none", "no-tokens-in-the-middle", COUNTS),
        (
            NoExpertTravels,
            "permutation",
            "a pair without an expert travels with weight 0",
            "arrivals-dropped",
            ARRIVALS,
        ),
        (PaddedArrivals, "permutation", "padding is given to an expert", "arrivals", ARRIVALS),
        (NarrowArrivals, "permutation", "rows travel in bfloat16", "arrivals", ARRIVALS),
        (IdsOfTheNextRow, "permutation", "ids stand beside other rows", "arrivals-scattered", ARRIVALS),
        (SharedOfEveryRank, "shared-experts", "the shared output is in a row once a rank", "shared", SHARED),
        (SharedOfTheFirst, "shared-experts", "the shared output is in the first rank's rows", "shared-uneven", SHARED),
        (CountsOfTheFirstExchange, "determinism-state", "the first exchange's sizes stay", "after-smaller", STATE),
        (OutputOfTheLast, "determinism-state", "outputs are added to the last ones", "after-larger", STATE),
    )
)
