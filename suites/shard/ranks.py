"""What each rank is given, and what the parts of all must sum to, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Engine, ExpertsInputs, ShardInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poisoned_allocations
from moe_conformance.model.specs import LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, SharedSpec
from moe_conformance.oracle.layer import layer_bound, layer_value
from moe_conformance.oracle.tolerance import Bound, Contract


def chosen(tokens: int, experts: int, top_k: int, dropped: int, seed: str, hot: int | None = None) -> Tensor:
    """ids [T, K] int64, distinct in a row. hot: an expert that is everybody's first.

    dropped: of 20 ids so many are -1; but of every five rows the first is whole and the last wholly -1.
    """
    logits = distinct_logits(tokens, experts, seed)
    if hot is not None:
        logits[:, hot] = float(experts)
    ids = logits.topk(top_k).indices
    gone = integers(ids.shape, f"{seed}-dropped", 20) < dropped
    if dropped:
        gone[::5], gone[4::5] = False, True
    return ids.masked_fill(gone, -1)


def unsharded(case: Case) -> ShardInputs:
    """The layer on one rank that holds all of it."""
    dtype = getattr(torch, case["dtype"])
    T, E, K, D = (case[name] for name in ("T", "E", "K", "D"))

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if ".b" in name:
            return normal(shape, f"parallel-{name}", dtype)
        # About 1 over the root of what is summed over, so that no part hides in another's rounding.
        return normal(shape, f"parallel-{name}", dtype, 2.0 ** round(-0.5 * (shape[-1] - 1).bit_length()))

    def tensors(mlp: MLPSpec, prefix: str, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
        return {name: tensor(name, shape) for name, shape in mlp.tensors(prefix, D, lead).items()}

    return ShardInputs(
        whole=ExpertsInputs(
            x=normal((T, D), "parallel-x", dtype),
            mlp=case["mlp"],
            tensors=tensors(case["mlp"], "experts", (E,)),
            ids=chosen(T, E, K, case["dropped"], "parallel-logits", case["hot"]),
            weights=2.5 * normal((T, K), "parallel-weights"),
        ),
        expert_map=torch.arange(E, dtype=torch.int32),
        shared=case["shared"],
        shared_tensors=tensors(case["shared"], "shared") if case["shared"] else {},
    )


def with_pairs(inputs: ShardInputs, **changed: Tensor) -> ShardInputs:
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
    want, bound = expected_sum(layer, everybody[0].ep_size, everybody[0].tp_size)
    compare.close(what, total, want, bound)


def same_part(engine: Engine, what: str, got: Tensor, want: Tensor, inputs: ShardInputs) -> None:
    """Two parts of the same rank that must not differ: in bits, or for an engine without "same_bits" by roundings."""
    if "same_bits" in engine.capabilities()["shard"]:
        compare.equal(what, got, want)
        return
    own = with_pairs(inputs, ids=inputs.whole.ids.where(held_pairs(inputs), -1))
    _, bound = expected_sum(own, inputs.ep_size, inputs.tp_size)
    compare.close(what, got, want, Bound(2 * bound.limit, f"of each of the two: {bound.origin}"))


def expected_sum(inputs: ShardInputs, size: int, tp: int) -> tuple[Tensor, Bound]:
    """The exact layer [T, D] in float64, and how far the sum of the parts of size x tp correct ranks may be from it.

    An expert divided among tp ranks rounds as tp narrower experts do that have the same weight, and a divided shared
    expert as so many shared ones. Where tp does not divide the width, the next number that does is counted. What a
    rank stores is one of the partial sums of `Contract.stored`, whichever pairs are in it.
    """
    layer, shared = inputs.whole, inputs.shared
    contract, width, blocks = Contract.stored(layer.x.dtype), layer.mlp.width, 2 if layer.mlp.gated else 1
    experts, whole = layer.experts, {**layer.tensors, **inputs.shared_tensors}
    dense = LayerSpec(
        hidden_size=layer.x.shape[1],
        num_experts=experts,
        logits=LogitsSpec(),
        routing=RoutingSpec(layer.ids.shape[1]),
        experts=layer.mlp,
        shared=SharedSpec(shared) if shared else None,
    )
    ids = torch.where(layer.ids < 0, experts, layer.ids)  # the oracle's id for a pair that no expert takes
    exact = layer_value(layer.x, dense, whole, ids, layer.weights, contract).exact

    slices = next(n for n in range(tp, width + 1) if width % n == 0)

    def divided(name: str, tensor: Tensor) -> Tensor:
        """[E, ...] -> [E slices, ...]; the first slice of an expert has its b2."""
        if name == "experts.b2":
            return F.pad(tensor[:, None], (0, 0, 0, slices - 1)).flatten(0, 1)
        if name == "experts.w2":
            columns: Tensor = tensor.unflatten(2, (slices, -1))
            return columns.movedim(2, 1).flatten(0, 1)
        rows: Tensor = tensor.unflatten(1, (blocks, slices, -1))
        return rows.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    narrow = replace(
        dense,
        num_experts=experts * slices,
        experts=replace(layer.mlp, width=width // slices),
        shared=SharedSpec(shared, count=size * tp, weighted=True) if shared else None,
    )
    tensors = {n: divided(n, t) if n.startswith("experts.") else t for n, t in whole.items()}
    ids = (ids[..., None] * slices + torch.arange(slices)).clamp(max=experts * slices).flatten(1)  # [T, K slices]
    weights, once = layer.weights.repeat_interleave(slices, -1), layer.x.new_ones(len(layer.x), size * tp)
    return exact, layer_bound(layer.x, narrow, tensors, ids, weights, contract, once if shared else None)


def to_device(inputs: ShardInputs, device: str) -> ShardInputs:
    """The inputs on the engine's device."""
    return moved(inputs, device)  # type: ignore[no-any-return]


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, ShardInputs | ExpertsInputs):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return {name: moved(tensor, device) for name, tensor in value.items()} if isinstance(value, dict) else value
