"""The experts of a layer on several ranks: whole experts divided among them (EP), each expert's width divided (TP).

Each function is the work of one rank. The sum of its part over all ranks is the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, ShardInputs
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import experts, mlp, wide
from moe_conformance.reference_impl.layer import Experts
from moe_conformance.reference_impl.parallel.expert_map import even_split, held_experts, physical_ids
from moe_conformance.reference_impl.parallel.ranks import Group, all_gather, reduce_scatter

Tensors = Mapping[str, Tensor]
# (x [T, D], ids [T, K], weights [T, K]) -> [T, D]
Part = Callable[[Tensor, Tensor, Tensor], Tensor]


def slice_width(
    spec: MLPSpec, tensors: Tensors, prefix: str, rank: int, size: int
) -> tuple[MLPSpec, dict[str, Tensor]]:
    """This rank's slice of an MLP's width F, as a narrower MLP: rows of gate, the same rows of up, columns of w2.

    w13 is gate above up, so its slice is two pieces. b2 is added once, so rank 0 alone has it and the others zeros.
    The sum of the slices is the MLP. tensors: as `MLPSpec.tensors(prefix)`, with or without a leading E. F need not be
    a multiple of size. Raises InputError for an MLP that normalises its output: a sum of normalised slices differs from
    the normalised sum.
    """
    if size == 1:
        return spec, {name: tensors[name] for name in spec.tensors(prefix, 0)}
    if spec.output_norm:
        raise InputError(f"{prefix}: got an output norm, want none where the width is divided; divide the experts")
    widths = even_split(spec.width, size)
    start, width = sum(widths[:rank]), widths[rank]
    blocks = 2 if spec.gated else 1

    def rows(tensor: Tensor, dim: int) -> Tensor:
        by_block: Tensor = tensor.unflatten(dim, (blocks, spec.width))  # [..., 2, F, D], or without D for a bias
        return by_block.narrow(dim, start, width).flatten(dim - 1, dim)

    first = "13" if spec.gated else "1"
    sliced = {
        f"{prefix}.w{first}": rows(tensors[f"{prefix}.w{first}"], -2),
        f"{prefix}.w2": tensors[f"{prefix}.w2"].narrow(-1, start, width),
    }
    if spec.bias:
        sliced[f"{prefix}.b{first}"] = rows(tensors[f"{prefix}.b{first}"], -1)
        b2 = tensors[f"{prefix}.b2"]
        sliced[f"{prefix}.b2"] = b2 if rank == 0 else torch.zeros_like(b2)
    return replace(spec, width=width), sliced


def take_experts(tensors: Tensors, held: Tensor) -> dict[str, Tensor]:
    """The experts' tensors [E, ...] of the experts `held` [n], in that order; the output norm [D] is one for all."""
    return {name: tensor if name.endswith("output_norm") else tensor[held] for name, tensor in tensors.items()}


def shard(inputs: ShardInputs, experts: Callable[[ExpertsInputs], Tensor] = experts) -> Tensor:
    """This rank's part of the layer, [T, D]: its slice of its experts, and its slice of the shared expert.

    experts: the `experts` stage that computes the former. The shared expert is divided among all ranks, whatever
    experts they have, so that it is in the sum once. Identity experts, which no rank holds, are computed by the first
    rank.
    Raises Unsupported for quantised experts and for adapters.
    """
    whole, held = inputs.whole, held_experts(inputs.expert_map)
    for name in ("quant", "lora"):
        if getattr(whole, name) is not None:
            raise Unsupported(f"shard: got {name}, want None; divide plain experts, and store each rank's part")
    rank, ranks = inputs.ep_rank * inputs.tp_size + inputs.tp_rank, inputs.ep_size * inputs.tp_size
    ids, identity = whole.ids, whole.ids >= whole.experts
    if inputs.physical_to_logical is not None:
        ids = physical_ids(ids.masked_fill(identity, -1), inputs.physical_to_logical, whole.experts)
        held = inputs.physical_to_logical[held]
    passed_on = whole.ids - whole.experts + len(inputs.expert_map) if rank == 0 else torch.full_like(whole.ids, -1)
    mlp_spec, tensors = slice_width(whole.mlp, whole.tensors, "experts", inputs.tp_rank, inputs.tp_size)
    output = experts(
        replace(
            whole,
            mlp=mlp_spec,
            tensors=take_experts(tensors, held),
            ids=torch.where(identity, passed_on, ids),
            expert_map=inputs.expert_map,
        )
    )
    if inputs.shared is None:
        return output
    shared_spec, shared_tensors = slice_width(inputs.shared, inputs.shared_tensors, "shared", rank, ranks)
    return output + mlp(whole.x, shared_spec, shared_tensors, "shared")


def through_all_gather(x: Tensor, ids: Tensor, weights: Tensor, part: Part, group: Group) -> Tensor:
    """The routed sum of this rank's own tokens: every rank sees all tokens, and sums meet where the tokens came from.

    x: [T, D], ids and weights [T, K], T differing from rank to rank, also 0. returns [T, D].
    """
    tokens = all_gather(group, x)
    output = part(torch.cat(tokens), torch.cat(all_gather(group, ids)), torch.cat(all_gather(group, weights)))
    return reduce_scatter(group, output, [len(own) for own in tokens])


def through_all_to_all(x: Tensor, ids: Tensor, weights: Tensor, maps: Tensor, part: Part, group: Group) -> Tensor:
    """As `through_all_gather`, but each token is sent once to each rank that holds one of its experts, as DeepEP does.

    maps: [ranks, E], every rank's expert map. A token without an expert is not sent and gets 0.
    """
    wanted = [torch.isin(ids, held_experts(expert_map)).any(-1).nonzero().flatten() for expert_map in maps]
    sent = torch.cat(wanted)  # this rank's tokens, by the rank they are sent to
    rows = [len(tokens) for tokens in wanted]
    arrived = [group.exchange(own[sent].split(rows)) for own in (x, ids, weights)]
    output = part(*(torch.cat(parts) for parts in arrived))
    returned = torch.cat(group.exchange(output.split([len(tokens) for tokens in arrived[0]])))
    total = torch.zeros_like(x, dtype=wide(x.dtype)).index_add_(0, sent, returned.to(wide(x.dtype)))
    return total.to(x.dtype)


def on_ranks(part: Part, maps: Tensor, group: Group, dispatch: Literal["all_gather", "all_to_all"]) -> Experts:
    """The `experts` argument of `layer.layer` on a rank with tokens of its own; every rank calls the layer.

    part: what this rank's experts add for any tokens, as `routed_experts` with its expert map does. maps: [ranks, E],
    all ranks' expert maps.
    Identity experts have no rank to send a token to: the token's own rank adds them.
    """

    def experts(
        x: Tensor, spec: MLPSpec, tensors: Tensors, ids: Tensor, weights: Tensor, *, identity_experts: int = 0
    ) -> Tensor:
        count = maps.shape[1]
        own = (ids >= count) & (ids < count + identity_experts)
        passed_on = x.to(wide(x.dtype)) * weights.masked_fill(~own, 0).sum(-1, keepdim=True)
        ids = ids.masked_fill(ids >= count, -1)
        if dispatch == "all_gather":
            routed = through_all_gather(x, ids, weights, part, group)
        else:
            routed = through_all_to_all(x, ids, weights, maps, part, group)
        return (routed + passed_on).to(x.dtype)

    return experts
