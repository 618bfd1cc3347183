"""What each rank is given, and what the parts of all must sum to, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Engine, ShardInputs
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


def whole(case: Case) -> ShardInputs:
    """The unsharded layer: one rank that holds all."""
    dtype = getattr(torch, case["dtype"])
    T, E, K, D, F_ = (case[name] for name in ("T", "E", "K", "D", "F"))
    spec = MLPSpec(F_, case["activation"], gated=case["gated"], bias=case["bias"])
    shared = MLPSpec(case["Fs"]) if case["shared"] else None
    shapes = spec.tensors("experts", D, (E,)) | (shared.tensors("shared", D) if shared else {})

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if ".b" in name:
            return normal(shape, f"parallel-{name}", dtype)
        # About 1 over the root of what is summed over, so that no part hides in another's rounding.
        return normal(shape, f"parallel-{name}", dtype, 2.0 ** round(-0.5 * (shape[-1] - 1).bit_length()))

    return ShardInputs(
        x=normal((T, D), "parallel-x", dtype),
        ids=chosen(T, E, K, case["dropped"], "parallel-logits", case["hot"]),
        weights=2.5 * normal((T, K), "parallel-weights"),
        experts=spec,
        tensors={name: tensor(name, shape) for name, shape in shapes.items()},
        expert_map=torch.arange(E, dtype=torch.int32),
        shared=shared,
    )


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
    return (inputs.ids >= 0) & (inputs.expert_map[inputs.ids] >= 0)


def expected(layer: ShardInputs, size: int, tp: int) -> tuple[Tensor, Bound]:
    """The exact layer [T, D] in float64, and how far the sum of the parts of size x tp correct ranks may be from it.

    An expert divided among tp ranks rounds as tp narrower experts do that have the same weight, and a divided shared
    expert as so many shared ones. Where tp does not divide the width, the next number that does is counted. What a
    rank stores is one of the partial sums of `Contract.stored`, whichever pairs are in it.
    """
    contract, width, blocks = Contract.stored(layer.x.dtype), layer.experts.width, 2 if layer.experts.gated else 1
    experts = len(layer.expert_map)
    dense = LayerSpec(
        hidden_size=layer.x.shape[1],
        num_experts=experts,
        logits=LogitsSpec(),
        routing=RoutingSpec(layer.ids.shape[1]),
        experts=layer.experts,
        shared=SharedSpec(layer.shared) if layer.shared else None,
    )
    ids = torch.where(layer.ids < 0, experts, layer.ids)  # the oracle's id for a pair that no expert takes
    exact = layer_value(layer.x, dense, layer.tensors, ids, layer.weights, contract).exact

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
        experts=replace(layer.experts, width=width // slices),
        shared=SharedSpec(layer.shared, count=size * tp, weighted=True) if layer.shared else None,
    )
    tensors = {n: divided(n, t) if n.startswith("experts.") else t for n, t in layer.tensors.items()}
    ids = (ids[..., None] * slices + torch.arange(slices)).clamp(max=experts * slices).flatten(1)  # [T, K slices]
    weights, once = layer.weights.repeat_interleave(slices, -1), layer.x.new_ones(len(layer.x), size * tp)
    return exact, layer_bound(layer.x, narrow, tensors, ids, weights, contract, once if layer.shared else None)


def on(inputs: ShardInputs, device: str) -> ShardInputs:
    """The inputs on the engine's device."""
    moved = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    moved = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
    return replace(inputs, **moved, tensors={name: tensor.to(device) for name, tensor in inputs.tensors.items()})


def parts_sum(engine: Engine, everybody: Sequence[ShardInputs]) -> Tensor:
    """The sum of the ranks' parts in float64, [T, D]; each part has the shape and dtype of x."""
    total = torch.zeros(everybody[0].x.shape, dtype=torch.float64)
    for inputs in everybody:
        what = f"part of rank ep{inputs.ep_rank} tp{inputs.tp_rank}"
        with poisoned_allocations():
            got = engine.shard(on(inputs, engine.info.device))
        compare.shape_and_type(what, got, inputs.x.shape, integer=False)
        compare.same(f"{what}, dtype", str(got.dtype), str(inputs.x.dtype))
        total += got.cpu().double()
    return total
