"""Experts on several simulated ranks. Small integers in float64 make all sums exact, so comparisons are equality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora, LoraSpec, QuantSpec, Routing, ShardInputs
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.judging.inputs import integers
from moe_conformance.model.specs import LatentSpec, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, SharedSpec
from moe_conformance.reference_impl.experts import experts, mlp, routed_experts
from moe_conformance.reference_impl.layer import experts_output, layer
from moe_conformance.reference_impl.parallel.expert_map import (
    even_split,
    expert_load,
    expert_map,
    held_experts,
    local_ids,
    physical_ids,
)
from moe_conformance.reference_impl.parallel.experts import (
    Part,
    on_ranks,
    shard,
    slice_width,
    take_experts,
    through_all_gather,
    through_all_to_all,
)
from moe_conformance.reference_impl.parallel.ranks import Group, all_gather, all_reduce, reduce_scatter, simulate

E, K, D = 11, 3, 6
NAN = float("nan")


# Maps ---------------------------------------------------------------------------------------------------------------


def test_eleven_experts_do_not_fill_three_ranks() -> None:
    assert even_split(11, 3) == [4, 4, 3]
    assert expert_map(11, 0, 3).tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1]
    assert expert_map(11, 1, 3).tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, -1, -1, -1]
    assert expert_map(11, 2, 3).tolist() == [-1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 2]
    assert expert_map(11, 2, 3, "round_robin").tolist() == [-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1]
    assert expert_map(11, 2, 3).dtype == torch.int32


def test_the_worked_example_of_the_docstring() -> None:
    assert expert_map(5, 1, 2).tolist() == [-1, -1, -1, 0, 1]
    assert expert_map(5, 1, 2, "round_robin").tolist() == [-1, 0, -1, 1, -1]


def test_a_rank_may_have_no_expert() -> None:
    assert expert_map(2, 2, 3).tolist() == [-1, -1]
    assert held_experts(expert_map(2, 2, 3)).tolist() == []
    assert local_ids(torch.tensor([[0, 1, -1]]), expert_map(2, 2, 3)).tolist() == [[-1, -1, -1]]


def test_a_map_need_not_rise() -> None:
    scattered = torch.tensor([2, -1, 0, -1, 1], dtype=torch.int32)
    assert held_experts(scattered).tolist() == [2, 4, 0]
    for dtype in (torch.int32, torch.int64):
        local = local_ids(torch.tensor([[0, 1, 2], [3, 4, -1]], dtype=dtype), scattered)
        assert (local.tolist(), local.dtype) == ([[2, -1, 0], [-1, 1, -1]], torch.int64)


@pytest.mark.parametrize("twice_or_gap", [[0, 0, -1], [1, 2, -1], [0, 2, -1]])
def test_local_ids_that_do_not_count_up_are_refused(twice_or_gap: list[int]) -> None:
    with pytest.raises(InputError, match="want each of 0 to 1 once"):
        held_experts(torch.tensor(twice_or_gap, dtype=torch.int32))


@pytest.mark.parametrize("outside", [-2, -5, 5, 2**31])
def test_ids_out_of_range_raise(outside: int) -> None:
    ids = torch.tensor([[0, outside], [4, -1]])
    with pytest.raises(InputError, match=r"ids: got .*, want -1 or 0 to 4"):
        local_ids(ids, expert_map(5, 1, 2))
    with pytest.raises(InputError, match=r"ids: got .*, want -1 or 0 to 4"):
        physical_ids(ids, torch.arange(5), 5)


# Copies -------------------------------------------------------------------------------------------------------------


def test_rows_take_the_copies_of_an_expert_in_turn() -> None:
    copies = torch.tensor([0, 1, 0])
    assert physical_ids(torch.tensor([[0], [0], [0]]), copies, 2).tolist() == [[0], [2], [0]]
    # Expert 2 lies at 1, 3 and 4, expert 0 at 2, expert 1 at 0.
    for dtype in (torch.int32, torch.int64):
        ids = torch.tensor([[2, 0], [2, 1], [-1, 2], [2, -1]], dtype=dtype)
        physical = physical_ids(ids, torch.tensor([1, 2, 0, 2, 2]), 3)
        assert (physical.tolist(), physical.dtype) == ([[1, 2], [3, 0], [-1, 4], [1, -1]], torch.int64)


@pytest.mark.parametrize("copies", [[0, 1, 1], [0, 1, 2, 3]])
def test_every_expert_must_have_a_copy_and_every_copy_an_expert(copies: list[int]) -> None:
    with pytest.raises(InputError, match="want every expert of 0 to 2"):
        physical_ids(torch.tensor([[0]]), torch.tensor(copies), 3)


def test_load_counts_real_pairs() -> None:
    ids = torch.tensor([[2, 0], [2, -1], [1, 2]], dtype=torch.int32)
    assert expert_load(ids, 4, tokens=2).tolist() == [1, 0, 2, 0]


# Slices of the width ------------------------------------------------------------------------------------------------


def test_gate_and_up_are_sliced_each() -> None:
    """F = 3 on two ranks: gate rows 0 to 2, up rows 3 to 5; rank 0 gets two of each, rank 1 one."""
    spec = MLPSpec(3, bias=True)
    tensors = {
        "shared.w13": torch.arange(6.0)[:, None],
        "shared.b13": torch.arange(6.0) + 10,
        "shared.w2": torch.arange(3.0)[None],
        "shared.b2": torch.tensor([7.0]),
    }
    (left, first), (right, second) = (slice_width(spec, tensors, "shared", rank, 2) for rank in (0, 1))
    assert (left.width, right.width) == (2, 1)
    assert first["shared.w13"].flatten().tolist() == [0, 1, 3, 4]
    assert second["shared.w13"].flatten().tolist() == [2, 5]
    assert (first["shared.b13"].tolist(), second["shared.b13"].tolist()) == ([10, 11, 13, 14], [12, 15])
    assert (first["shared.w2"].tolist(), second["shared.w2"].tolist()) == ([[0, 1]], [[2]])
    assert (first["shared.b2"].tolist(), second["shared.b2"].tolist()) == ([7], [0])


def test_an_output_norm_forbids_slices_and_no_more() -> None:
    spec = MLPSpec(4, output_norm=1e-6)
    tensors = {name: torch.randn(shape) for name, shape in spec.tensors("experts", D, (E,)).items()}
    with pytest.raises(InputError, match="divide the experts"):
        slice_width(spec, tensors, "experts", 0, 2)
    same, whole = slice_width(spec, {**tensors, "router.proj": torch.zeros(1)}, "experts", 0, 1)
    assert same == spec
    assert whole == tensors
    taken = take_experts(whole, torch.tensor([4, 2]))
    assert torch.equal(taken["experts.w2"], tensors["experts.w2"][[4, 2]])
    assert taken["experts.output_norm"] is tensors["experts.output_norm"]


# Ranks --------------------------------------------------------------------------------------------------------------


def test_an_exchange_gives_each_rank_its_part_of_every_other() -> None:
    def run(group: Group) -> list[list[int]]:
        """Rank r sends r + to rows of 10 r + to."""
        parts = [torch.full((group.rank + to,), 10 * group.rank + to) for to in range(group.size)]
        return [part.tolist() for part in group.exchange(parts)]

    assert simulate(3, run) == [[[], [10], [20, 20]], [[1], [11, 11], [21] * 3], [[2, 2], [12] * 3, [22] * 4]]


def test_collectives_are_made_of_exchanges() -> None:
    def run(group: Group) -> tuple[list[list[int]], list[int], list[int]]:
        x = torch.arange(3) + 10 * group.rank
        gathered = [part.tolist() for part in all_gather(group, x[: group.rank + 1])]
        return gathered, all_reduce(group, x).tolist(), reduce_scatter(group, x, [2, 1]).tolist()

    gathered = [[0], [10, 11]]
    assert simulate(2, run) == [(gathered, [10, 12, 14], [10, 12]), (gathered, [10, 12, 14], [14])]


def test_what_arrives_is_the_receivers_own() -> None:
    def run(group: Group) -> list[int]:
        x = torch.zeros(2, dtype=torch.int64)
        for part in all_gather(group, x):
            part += 1
        all_gather(group, x)
        return x.tolist()

    assert simulate(2, run) == [[0, 0], [0, 0]]


def test_a_rank_that_raises_does_not_leave_the_others_waiting() -> None:
    def run(group: Group) -> None:
        if group.rank == 1:
            raise KeyError("rank 1")
        all_gather(group, torch.zeros(1))

    with pytest.raises(KeyError, match="rank 1"):
        simulate(3, run)


# Layers -------------------------------------------------------------------------------------------------------------

FORMS = {
    "gated": MLPSpec(7, "relu"),
    "bias": MLPSpec(7, "relu", bias=True),
    "not-gated": MLPSpec(5, "relu2", gated=False, bias=True),
    "clamped": MLPSpec(7, "relu", clamp="before", limit=5.0, up_offset=1.0, bias=True),
    "weight-on-input": MLPSpec(7, "relu", bias=True, weight_on="input"),
    "weight-on-w2-input": MLPSpec(7, "relu", bias=True, weight_on="w2_input"),
}


def numbers(shape: tuple[int, ...], seed: str) -> Tensor:
    """Integers of -4 to 4 in float64."""
    return integers(shape, seed, 5, -4).double()


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], ids [T, K] of which a third is -1 and every fourth row wholly, with weights of NaN there."""
    ids = integers((tokens, K), "ids", E)
    ids[integers((tokens, K), "none", 3) == 0] = -1
    ids[3::4] = -1
    return numbers((tokens, D), "x"), ids, numbers((tokens, K), "weights").masked_fill(ids < 0, NAN)


def tensors_of(spec: MLPSpec) -> dict[str, Tensor]:
    return {name: numbers(shape, name) for name, shape in spec.tensors("experts", D, (E,)).items()}


def dense(spec: MLPSpec, tensors: dict[str, Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return routed_experts(x, spec, tensors, ids, weights)


def part_of(spec: MLPSpec, tensors: dict[str, Tensor], owners: Tensor, tp_rank: int = 0, tp_size: int = 1) -> Part:
    """What one rank computes. owners: its expert map."""
    narrow, sliced = slice_width(spec, tensors, "experts", tp_rank, tp_size)
    mine = take_experts(sliced, held_experts(owners))
    return lambda x, ids, weights: routed_experts(x, narrow, mine, ids, weights, expert_map=owners)


@pytest.mark.parametrize("ep, tp", [(1, 1), (3, 1), (1, 3), (2, 2), (3, 2), (12, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_on_every_rank_the_sum_is_the_layer(form: str, ep: int, tp: int) -> None:
    spec = FORMS[form]
    tensors, (x, ids, weights) = tensors_of(spec), batch(17)

    def run(group: Group) -> Tensor:
        ep_rank, tp_rank = divmod(group.rank, tp)
        return all_reduce(group, part_of(spec, tensors, expert_map(E, ep_rank, ep), tp_rank, tp)(x, ids, weights))

    want = dense(spec, tensors, x, ids, weights)
    assert want.any() and want.isfinite().all()
    assert all(torch.equal(got, want) for got in simulate(ep * tp, run))


def test_an_output_norm_leaves_experts_divisible() -> None:
    spec = MLPSpec(7, "relu", output_norm=1e-6)
    tensors, (x, ids, weights) = tensors_of(spec), batch(9)
    ids[:, 1:] = -1  # one expert a token: its rounded output is added to zeros only
    got = simulate(
        3, lambda group: all_reduce(group, part_of(spec, tensors, expert_map(E, group.rank, 3))(x, ids, weights))
    )
    assert torch.equal(got[0], dense(spec, tensors, x, ids, weights))


# Tokens of each data-parallel rank.
COUNTS = [(5, 4, 8), (0, 7, 3), (9, 0, 0), (0, 0, 0), (1, 1, 1)]


def through(dispatch: str, tp: int, group: Group, part: Part) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The two ways to the experts, with the same arguments."""
    if dispatch == "all_gather":
        return lambda *own: through_all_gather(*own, part, group)
    maps = torch.stack([expert_map(E, rank // tp, group.size // tp, "round_robin") for rank in range(group.size)])
    return lambda *own: through_all_to_all(*own, maps, part, group)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("tp", [1, 3])
def test_every_data_parallel_rank_gets_its_own_tokens_back(dispatch: str, counts: tuple[int, ...], tp: int) -> None:
    """Experts are on all ranks, divided or sliced; the shared expert, which every rank has, is added to own tokens."""
    spec = LayerSpec(D, E, LogitsSpec(), RoutingSpec(K), FORMS["bias"], SharedSpec(MLPSpec(4, "relu")))
    assert spec.shared is not None
    shared = {name: numbers(shape, name) for name, shape in spec.shared.mlp.tensors("shared", D).items()}
    tensors, tokens = {**tensors_of(spec.experts), **shared}, batch(sum(counts))

    def run(group: Group) -> Tensor:
        assert spec.shared is not None
        own = [whole.split(counts)[group.rank] for whole in tokens]
        ep_rank, tp_rank = divmod(group.rank, tp)
        part = part_of(spec.experts, tensors, expert_map(E, ep_rank, 3 // tp, "round_robin"), tp_rank, tp)
        return through(dispatch, tp, group, part)(*own) + mlp(own[0], spec.shared.mlp, shared, "shared")

    x, ids, weights = tokens
    want = experts_output(x, spec, tensors, ids, weights)
    for got, own in zip(simulate(3, run), want.split(counts), strict=True):
        assert torch.equal(got, own)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_a_whole_layer_on_three_ranks_is_the_layer(dispatch: Literal["all_gather", "all_to_all"]) -> None:
    """Latent width, scale, shared and identity experts, dropped pairs; each rank calls it with its own tokens."""
    routing = RoutingSpec(K, identity_experts=2)
    latent = LatentSpec(4)
    spec = LayerSpec(
        D, E, LogitsSpec(), routing, FORMS["bias"], SharedSpec(MLPSpec(4, "relu")), latent, output_scale=3.0
    )
    tensors = {name: numbers(shape, name) for name, shape in spec.tensors().items()}
    counts = (5, 0, 4)
    x, ids, weights = batch(sum(counts))
    first, last = ids[ids >= 0].min(), ids.max()
    ids = torch.where(ids == first, E, torch.where(ids == last, E + 1, ids))
    assert {E, E + 1, -1} <= set(ids.flatten().tolist())  # both identity experts, and none
    maps = torch.stack([expert_map(E, rank, 3, "round_robin") for rank in range(3)])

    def run(group: Group) -> Tensor:
        own_x, own_ids, own_weights = (whole.split(counts)[group.rank] for whole in (x, ids, weights))
        part = part_of(spec.experts, tensors, maps[group.rank], 0, 1)
        given = Routing(own_ids, own_weights)
        return layer(own_x, spec, tensors, routing=given, experts=on_ranks(part, maps, group, dispatch)).output

    want = layer(x, spec, tensors, routing=Routing(ids, weights)).output
    for got, own in zip(simulate(3, run), want.split(counts), strict=True):
        assert torch.equal(got, own)


def test_a_token_goes_once_to_each_rank_that_has_an_expert_of_it() -> None:
    """Six experts on three ranks. Token 0 needs ranks 0 and 2, token 1 rank 0 alone, token 2 none."""
    x, ids = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, 1, 5], [1, -1, 0], [-1, -1, -1]])
    maps = torch.stack([expert_map(6, rank, 3) for rank in range(3)])

    def run(group: Group) -> tuple[list[float], list[float]]:
        arrived: list[float] = []

        def part(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            arrived.extend(x.flatten().tolist())
            return x * 10 ** (group.rank + 1)

        rows = slice(None) if group.rank == 1 else slice(0)  # rank 1 alone has tokens
        own = x[rows], ids[rows], torch.ones(3, 3)[rows]
        return arrived, through_all_to_all(*own, maps, part, group).flatten().tolist()

    assert simulate(3, run) == [([1, 2], []), ([], [1010, 20, 0]), ([1], [])]


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_sums_over_ranks_are_rounded_once(dispatch: str) -> None:
    """256 + 1 + 1 is 258 in bfloat16, 256 where each sum is rounded."""
    one = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]]), torch.ones(1, 3)

    def run(group: Group) -> Tensor:
        value = 256.0 if group.rank == 0 else 1.0
        return through(dispatch, 1, group, lambda x, ids, weights: torch.full_like(x, value))(*one)

    for got in simulate(3, run):
        assert (got.item(), got.dtype) == (258.0, torch.bfloat16)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_copies_and_their_rearrangement_leave_the_output(dispatch: str) -> None:
    """Each rank chooses copies for its own tokens before they travel, and captures logical ids."""
    spec = FORMS["bias"]
    tensors, tokens, counts = tensors_of(spec), batch(17), (6, 0, 11)
    x, ids, weights = tokens
    want = dense(spec, tensors, x, ids, weights)
    for copies in ([*range(E), 3, 7, 3, 3], [3, 9, 0, 3, 7, 1, 10, 3, 3, 5, 7, 2, 8, 6, 4]):
        logical = torch.tensor(copies)
        maps = torch.stack([expert_map(len(copies), rank, 3) for rank in range(3)])

        def run(group: Group, logical: Tensor = logical, maps: Tensor = maps) -> tuple[Tensor, Tensor]:
            own_x, own_ids, own_weights = (whole.split(counts)[group.rank] for whole in tokens)
            mine = take_experts(tensors, logical[held_experts(maps[group.rank])])
            own = own_x, physical_ids(own_ids, logical, E), own_weights

            def part(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
                return routed_experts(x, spec, mine, ids, weights, expert_map=maps[group.rank])

            if dispatch == "all_gather":
                return through_all_gather(*own, part, group), expert_load(own_ids, E, len(own_ids))
            return through_all_to_all(*own, maps, part, group), expert_load(own_ids, E, len(own_ids))

        results = simulate(3, run)
        assert torch.equal(torch.cat([output for output, _ in results]), want)
        assert sum(load for _, load in results).tolist() == [int((ids == expert).sum()) for expert in range(E)]


def test_a_sliced_shared_expert_is_added_before_the_sum() -> None:
    spec = MLPSpec(7, "relu", bias=True)
    tensors, x = {name: numbers(shape, name) for name, shape in spec.tensors("shared", D).items()}, batch(5)[0]
    got = simulate(
        3, lambda group: all_reduce(group, mlp(x, *slice_width(spec, tensors, "shared", group.rank, 3), "shared"))
    )
    assert torch.equal(got[1], mlp(x, spec, tensors, "shared"))
    assert replace(spec, width=2) == slice_width(spec, tensors, "shared", 2, 3)[0]


# The stage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, [3, 9, 0, 3, 7, 1, 10, 3, 3, 5, 7, 2, 8, 6, 4]], ids=["", "copies"])
def test_parts_sum_to_the_layer_whatever_it_has(copies: list[int] | None) -> None:
    """Two by two ranks, experts' widths divided unevenly, identity experts, a scale, a shared expert, dropped pairs."""
    spec, shared = FORMS["bias"], MLPSpec(7, "relu", bias=True)
    x, ids, weights = batch(9)
    ids = torch.where(ids == 4, E, torch.where(ids == 7, E + 1, ids))
    assert {E, E + 1, -1} <= set(ids.flatten().tolist())
    whole = ExpertsInputs(x, spec, tensors_of(spec), ids, weights, output_scale=3.0, identity_experts=2)
    tensors = {name: numbers(shape, name) for name, shape in shared.tensors("shared", D).items()}
    logical = None if copies is None else torch.tensor(copies)
    count = E if copies is None else len(copies)
    parts = [
        shard(ShardInputs(whole, expert_map(count, ep, 2), ep, 2, tp, 2, shared, tensors, logical))
        for ep in range(2)
        for tp in range(2)
    ]
    assert torch.equal(sum(parts), experts(whole) + mlp(x, shared, tensors, "shared"))


def test_an_engine_may_compute_the_experts_of_a_rank_itself() -> None:
    seen = []

    def watched(inputs: ExpertsInputs) -> Tensor:
        seen.append(inputs)
        return experts(inputs)

    x, ids, weights = batch(5)
    whole = ExpertsInputs(x, FORMS["gated"], tensors_of(FORMS["gated"]), ids, weights, output_scale=2.0)
    got = shard(ShardInputs(whole, expert_map(E, 1, 3), 1, 3), watched)
    (inputs,) = seen
    assert inputs.tensors["experts.w13"].shape == (4, 14, D) and inputs.experts == E and inputs.output_scale == 2
    assert torch.equal(got, experts(inputs))


@pytest.mark.parametrize("name", ["quant", "lora"])
def test_stored_or_adapted_experts_are_not_divided(name: str) -> None:
    whole = ExpertsInputs(*batch(1)[:1], FORMS["gated"], tensors_of(FORMS["gated"]), *batch(1)[1:])
    given: Any = QuantSpec("int8", "channel") if name == "quant" else Lora(LoraSpec(1, 1, 1.0), {}, torch.tensor([0]))
    with pytest.raises(Unsupported, match=f"shard: got {name}, want None"):
        shard(ShardInputs(replace(whole, **{name: given}), expert_map(E, 0, 1)))
