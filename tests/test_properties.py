"""Properties that hold for any input, of the reference: what a wrong sum, order or default would break.

Derandomised: the same inputs in every run. Values are integers over 64, so that sums in float64 are exact, and what is
asked for equality is equal.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_conformance.engine import (
    AlignInputs,
    CheckpointName,
    ExpertsInputs,
    FusedShared,
    MLPSpec,
    RouteInputs,
    RoutingSpec,
    ShardInputs,
)
from moe_conformance.judging.inputs import bits, distinct_logits, normal
from moe_conformance.reference_impl.checkpoint.loading import load
from moe_conformance.reference_impl.checkpoint.remap import remap
from moe_conformance.reference_impl.dispatch import align
from moe_conformance.reference_impl.experts import experts
from moe_conformance.reference_impl.parallel.expert_map import expert_map
from moe_conformance.reference_impl.parallel.experts import shard
from moe_conformance.reference_impl.routing import route
from moe_conformance.suites.load.checkpoint import write
from moe_conformance.suites.remap.names import config_of, names_of

EVERY = settings(
    derandomize=True, deadline=None, max_examples=12, database=None, suppress_health_check=[HealthCheck.too_slow]
)
seeds, booleans = st.integers(0, 2**30), st.booleans()
# A float32 sum of so few terms in another order is another float32 within this; exact values are below 2^9.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@st.composite
def batches(draw: Any, dropped: bool = True) -> ExpertsInputs:
    """Tokens, experts of any function, ids distinct in a row, some of them -1."""
    tokens, count, width, narrow = draw(st.tuples(*(st.integers(*ends) for ends in ((1, 9), (2, 7), (3, 9), (2, 6)))))
    top_k, seed = draw(st.integers(1, count)), str(draw(seeds))
    mlp = MLPSpec(
        narrow,
        draw(st.sampled_from(("silu", "gelu", "gelu_tanh", "relu2"))),
        gated=draw(booleans),
        bias=draw(booleans),
    )
    shapes = mlp.tensors("experts", width, (count,)).items()
    ids = distinct_logits(tokens, count, f"{seed} ids").topk(top_k).indices
    if dropped and draw(booleans):
        ids = ids.masked_fill(bits(ids.shape, f"{seed} gone") % 3 == 0, -1)
    return ExpertsInputs(
        x=normal((tokens, width), f"{seed} x"),
        mlp=mlp,
        tensors={name: normal(shape, f"{seed} {name}", std=0.25) for name, shape in shapes},
        ids=ids,
        weights=normal(tuple(ids.shape), f"{seed} weights"),
    )


def order_of(size: int, seed: int) -> Tensor:
    return bits((size,), f"{seed} order").argsort()


@EVERY
@given(batches(), seeds)
def test_tokens_in_another_order_have_their_own_sums(inputs: ExpertsInputs, seed: int) -> None:
    order = order_of(len(inputs.x), seed)
    moved = replace(inputs, x=inputs.x[order], ids=inputs.ids[order], weights=inputs.weights[order])
    torch.testing.assert_close(experts(moved), experts(inputs)[order], **NEAR)


@EVERY
@given(batches(), seeds)
def test_experts_under_other_numbers_are_the_same_experts(inputs: ExpertsInputs, seed: int) -> None:
    order = order_of(inputs.experts, seed)  # the expert that becomes each
    ids = torch.where(inputs.ids < 0, -1, order.argsort()[inputs.ids])
    moved = replace(inputs, ids=ids, tensors={name: tensor[order] for name, tensor in inputs.tensors.items()})
    torch.testing.assert_close(experts(moved), experts(inputs), **NEAR)


@EVERY
@given(batches(), st.sampled_from((0.0, -2.0, 0.25, 8.0)))
def test_the_sum_is_linear_in_weights_and_scale(inputs: ExpertsInputs, factor: float) -> None:
    """Powers of two, which change no bit but the exponent's."""
    base = experts(inputs) * factor
    torch.testing.assert_close(experts(replace(inputs, weights=inputs.weights * factor)), base, **NEAR)
    torch.testing.assert_close(experts(replace(inputs, output_scale=factor)), base, **NEAR)
    other = inputs.weights.flip(0) + 0.5
    both = experts(replace(inputs, weights=inputs.weights + other))
    torch.testing.assert_close(both, experts(inputs) + experts(replace(inputs, weights=other)), rtol=1e-4, atol=1e-4)


@EVERY
@given(batches(), st.integers(1, 4))
def test_chunks_are_the_batch(inputs: ExpertsInputs, size: int) -> None:
    parts = zip(*(tensor.split(size) for tensor in (inputs.x, inputs.ids, inputs.weights)), strict=True)
    found = [experts(replace(inputs, x=x, ids=ids, weights=weights)) for x, ids, weights in parts]
    torch.testing.assert_close(torch.cat(found), experts(inputs), **NEAR)


@EVERY
@given(batches(), st.integers(1, 5))
def test_padding_rows_change_no_token(inputs: ExpertsInputs, rows: int) -> None:
    tokens = len(inputs.ids)

    def behind(tensor: Tensor, value: float) -> Tensor:
        return torch.cat([tensor, tensor.new_full((rows, tensor.shape[1]), value)])

    nan = float("nan")
    padded = replace(inputs, x=behind(inputs.x, nan), ids=behind(inputs.ids, -1), weights=behind(inputs.weights, nan))
    found = experts(padded)
    torch.testing.assert_close(found[:tokens], experts(inputs), **NEAR)
    assert found[tokens:].eq(0).all()


@EVERY
@given(batches(), st.integers(1, 4), st.sampled_from(("contiguous", "round_robin")), booleans)
def test_ranks_sum_to_the_whole_with_routed_and_shared_apart(
    inputs: ExpertsInputs, ranks: int, placement: Any, has_shared: bool
) -> None:
    width = inputs.x.shape[1]
    shared = MLPSpec(4) if has_shared else None
    tensors = {name: normal(shape, name, std=0.25) for name, shape in MLPSpec(4).tensors("shared", width).items()}
    whole = ShardInputs(inputs, torch.arange(inputs.experts), shared=shared, shared_tensors=tensors if shared else {})
    total = torch.zeros_like(inputs.x)
    for rank in range(ranks):
        held = expert_map(inputs.experts, rank, ranks, placement)
        total += shard(replace(whole, expert_map=held, ep_rank=rank, ep_size=ranks))
    torch.testing.assert_close(total, shard(whole), rtol=1e-4, atol=1e-4)
    alone = shard(replace(whole, whole=replace(inputs, ids=torch.full_like(inputs.ids, -1))))
    torch.testing.assert_close(experts(inputs) + alone, shard(whole), rtol=1e-4, atol=1e-4)


@st.composite
def routers(draw: Any) -> RouteInputs:
    groups = draw(st.sampled_from((1, 1, 2)))
    count = groups * draw(st.integers(2, 6))
    biased = draw(booleans)
    score: Any = draw(st.sampled_from(("softmax", "sigmoid")))
    spec = RoutingSpec(
        draw(st.integers(1, count // groups)),
        score=score,
        selection_bias=biased,
        groups=groups,
        renormalize=draw(st.sampled_from(("no", "sum"))),
        scale=draw(st.sampled_from((1.0, 2.5))),
    )
    seed = str(draw(seeds))
    tensors = {"router.selection_bias": normal((count,), f"{seed} bias", std=0.25)} if biased else {}
    return RouteInputs(distinct_logits(draw(st.integers(1, 9)), count, seed), spec, tensors)


def dense(inputs: RouteInputs) -> Tensor:
    """[T, E] of weights."""
    ids, weights = route(inputs)
    return torch.zeros(inputs.logits.shape).scatter(1, ids.long(), weights)


@EVERY
@given(routers(), st.sampled_from((-32.0, 16.0)))
def test_a_constant_in_all_logits_of_a_softmax_changes_nothing(inputs: RouteInputs, shift: float) -> None:
    assume(inputs.routing.score == "softmax")
    torch.testing.assert_close(dense(replace(inputs, logits=inputs.logits + shift)), dense(inputs), **NEAR)


@EVERY
@given(routers(), st.sampled_from((-4.0, 8.0)))
def test_a_constant_in_all_biases_changes_nothing(inputs: RouteInputs, shift: float) -> None:
    assume(inputs.routing.selection_bias)
    scores = inputs.tensors["router.selection_bias"]
    torch.testing.assert_close(
        dense(replace(inputs, tensors={"router.selection_bias": scores + shift})), dense(inputs), **NEAR
    )


@EVERY
@given(routers(), seeds)
def test_experts_of_a_router_in_another_order_get_their_own_weights(inputs: RouteInputs, seed: int) -> None:
    """Within groups, which stay what they are."""
    groups = inputs.routing.groups
    size = inputs.logits.shape[1] // groups
    order = torch.cat([order_of(size, seed + group) + group * size for group in range(groups)])
    tensors = {name: tensor[order] for name, tensor in inputs.tensors.items()}
    moved = replace(inputs, logits=inputs.logits[:, order], tensors=tensors)
    torch.testing.assert_close(dense(moved), dense(inputs)[:, order], **NEAR)


@EVERY
@given(routers())
def test_shared_slots_stand_behind_routed_ones_that_do_not_notice(inputs: RouteInputs) -> None:
    ids, weights = route(replace(inputs, fused_shared=FusedShared(2, "constant", 0.5)))
    alone = route(inputs)
    top_k = inputs.routing.top_k
    assert ids[:, :top_k].equal(alone.ids) and weights[:, :top_k].equal(alone.weights)
    assert weights[:, top_k:].eq(0.5).all()


@EVERY
@given(st.integers(1, 12), st.integers(1, 6), st.sampled_from((1, 2, 4, 16)), seeds, booleans)
def test_unpermute_is_the_inverse_of_permute(tokens: int, count: int, block: int, seed: int, dropped: bool) -> None:
    """Pairs sorted into blocks and put back are the pairs; none is lost, doubled or another expert's."""
    ids = distinct_logits(tokens, count, f"{seed} ids").topk(min(2, count)).indices
    if dropped:
        ids = ids.masked_fill(bits(ids.shape, f"{seed} gone") % 3 == 0, -1)
    found = align(AlignInputs(ids, count, block).ids, count, block, None)
    slots, blocks = found.slot_to_pair[: int(found.padded_count)], found.expert_of_block
    pairs = torch.arange(ids.numel())
    permuted = torch.cat([pairs, torch.tensor([-7])])[slots.long().clamp(max=ids.numel())]
    back = torch.full_like(pairs, -1)
    real = slots < ids.numel()
    back[slots[real].long()] = permuted[real]
    assert back.equal(torch.where(ids.flatten() >= 0, pairs, -1))
    of_slot = blocks.repeat_interleave(block)[: len(slots)]
    assert of_slot[real].long().equal(ids.flatten()[slots[real].long()])
    assert int(found.padded_count) % block == 0


@EVERY
@given(st.sampled_from(("plain", "moe", "packed-multimodal")), st.randoms(use_true_random=False))
def test_names_are_mapped_one_by_one_in_any_order_and_again(style: str, random: Any) -> None:
    """Of the first mapping's own names, those that are mapped again stay what they are."""
    names = list(names_of(style, ("weight",)).values())
    once = remap(config_of(style), names)
    random.shuffle(names)
    assert remap(config_of(style), names) == once
    own = {target: name.shape for name in names for target in once[name.name] if isinstance(target, str)}
    assert set(remap(config_of(style), [CheckpointName(name) for name in own])) == set(own)


@settings(EVERY, max_examples=6)
@given(st.sampled_from(("plain", "packed")), st.integers(1, 3), booleans)
def test_a_checkpoint_loads_the_same_twice_in_any_shards(style: str, shards: int, shuffled: bool) -> None:
    recipe = {"style": style, "widths": "distinct", "shards": shards, "shuffled": shuffled}
    with tempfile.TemporaryDirectory() as folder:
        want = write(Path(folder), recipe)
        first, second = load(Path(folder)), load(Path(folder))
    assert all(first[name].equal(tensor) for name, tensor in want.items())
    assert first.keys() == second.keys()
    assert all(second[name].equal(tensor) for name, tensor in first.items())
