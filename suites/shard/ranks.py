"""What each rank is given, and what its part is held against."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Engine, ExpertsInputs, ShardInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, fine, integers, normal, poisoned_allocations
from moe_conformance.judging.layouts import given_as
from moe_conformance.judging.repeats import assert_repeats
from moe_conformance.model.specs import MLPSpec
from moe_conformance.oracle.bounds import Bound
from moe_conformance.oracle.experts import expected_parts
from moe_conformance.protocol.moving import to_device


def chosen(
    tokens: int,
    experts: int,
    top_k: int,
    dropped: int,
    seed: str,
    hot: int | None = None,
    unpicked: Sequence[int] = (),
) -> Tensor:
    """ids [T, K] int64, distinct in a row. hot: an expert that is everybody's first. unpicked: nobody's.

    dropped: of 20 ids so many are -1; but of every five rows the first is whole and the last wholly -1.
    """
    logits = distinct_logits(tokens, experts, seed)
    if hot is not None:
        logits[:, hot] = float(experts)
    logits[:, list(unpicked)] = -float("inf")
    ids = logits.topk(top_k).indices
    gone = integers(ids.shape, f"{seed}-dropped", 20) < dropped
    if dropped:
        gone[::5], gone[4::5] = False, True
    return ids.masked_fill(gone, -1)


def unsharded(case: Case, given: Collection[str] | None = None) -> ShardInputs:
    """The layer on one rank that holds all of it. given: as for experts (suites/experts/inputs.py)."""
    as_given = partial(given_as, case["arguments"], given)
    dtype = getattr(torch, case["dtype"])
    T, E, K, D = (case[name] for name in ("T", "E", "K", "D"))

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if ".b" in name:
            return fine(shape, f"parallel-{name}", dtype)
        # About 1 over the root of what is summed over, so that no part hides in another's rounding.
        return fine(shape, f"parallel-{name}", dtype, 2.0 ** round(-0.5 * (shape[-1] - 1).bit_length()))

    def tensors(mlp: MLPSpec, prefix: str, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
        return {name: as_given("tensors", tensor(name, shape)) for name, shape in mlp.tensors(prefix, D, lead).items()}

    return ShardInputs(
        whole=ExpertsInputs(
            x=as_given("x", fine((T, D), "parallel-x", dtype)),
            mlp=case["mlp"],
            tensors=tensors(case["mlp"], "experts", (E,)),
            ids=as_given(
                "ids", chosen(T, E + case["identity_experts"], K, case["dropped"], "parallel-logits", case["hot"])
            ),
            weights=as_given("weights", 2.5 * (fine if dtype == torch.float32 else normal)((T, K), "parallel-weights")),
            output_scale=case["output_scale"],
            identity_experts=case["identity_experts"],
        ),
        expert_map=torch.arange(E, dtype=torch.int32),
        shared=case["shared"],
        shared_tensors=tensors(case["shared"], "shared") if case["shared"] else {},
    )


def with_pairs(inputs: ShardInputs, **changed: Any) -> ShardInputs:
    """The same rank with other x, ids or weights."""
    return replace(inputs, whole=replace(inputs.whole, **changed))


def ranks(case: Case, layer: ShardInputs, copies: Sequence[int] = ()) -> list[ShardInputs]:
    """The same layer as each rank is given it, those with the same experts side by side.

    copies: the expert that each physical one is a copy of; these lie on the ranks in equal runs.
    """
    owners = case["owners"]
    size, tp = max(owners) + 1, case["tp"]
    if copies:
        owners = [physical * size // len(copies) for physical in range(len(copies))]
    layer = replace(layer, ep_size=size, tp_size=tp)
    if copies:
        layer = replace(layer, physical_to_logical=torch.tensor(copies))
    maps = [expert_map(owners, rank, case["rotated"]) for rank in range(size)]
    return [replace(layer, expert_map=maps[r], ep_rank=r, tp_rank=slice_) for r in range(size) for slice_ in range(tp)]


def expert_map(owners: Sequence[int], rank: int, rotated: bool) -> Tensor:
    """[E] int32. rotated: the first of a rank's experts is its last, which no order of ids explains."""
    held = [expert for expert, owner in enumerate(owners) if owner == rank]
    if rotated:
        held = held[1:] + held[:1]
    return torch.tensor([held.index(e) if e in held else -1 for e in range(len(owners))], dtype=torch.int32)


def held_pairs(inputs: ShardInputs) -> Tensor:
    """[T, K] bool, the pairs that this rank computes, where every expert is on one rank."""
    ids = inputs.whole.ids
    return (ids >= 0) & (inputs.expert_map[ids] >= 0)


def part_of(engine: Engine, inputs: ShardInputs) -> Tensor:
    """This rank's part [T, D] in float64 on the CPU; every fresh allocation of the engine is poisoned."""
    what, x = name_of(inputs), inputs.whole.x
    with poisoned_allocations():
        got = engine.shard(to_device(inputs, engine.info.device))
    compare.shape_and_type(what, got, x.shape, integer=False)
    compare.same(f"{what}, dtype", str(got.dtype), str(x.dtype))
    return got.cpu().double()


def name_of(inputs: ShardInputs) -> str:
    return f"part of rank ep{inputs.ep_rank} tp{inputs.tp_rank}"


def judge_sum(engine: Engine, what: str, layer: ShardInputs, everybody: Sequence[ShardInputs]) -> None:
    """The parts of all ranks sum to the exact layer, within what correct ranks may be from it."""
    total = torch.zeros(layer.whole.x.shape, dtype=torch.float64)
    for inputs in everybody:
        total += part_of(engine, inputs)
    compare.close(what, total, *expected(everybody[0]))


def same_part(engine: Engine, what: str, got: Tensor, want: Tensor, inputs: ShardInputs) -> None:
    """Two parts of the same rank that must not differ: in bits, or for an engine without "same_bits" by roundings."""
    own = with_pairs(inputs, ids=inputs.whole.ids.where(held_pairs(inputs), -1))
    assert_repeats(what, engine, "shard", got, want, expected(own)[1])


def expected(inputs: ShardInputs) -> tuple[Tensor, Bound]:
    """The exact sum of all parts, and how far that of correct ranks may be from it."""
    return expected_parts(inputs.whole, inputs.shared, inputs.shared_tensors, inputs.ep_size, inputs.tp_size)
