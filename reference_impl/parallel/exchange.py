"""Ranks with tokens of their own: dispatch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moe_conformance.engine import Arrived, Exchanged, ExchangeInputs
from moe_conformance.reference_impl.experts import mlp, routed_experts, wide
from moe_conformance.reference_impl.parallel.expert_map import local_ids
from moe_conformance.reference_impl.parallel.experts import Part, through_all_to_all
from moe_conformance.reference_impl.parallel.ranks import Group, Process, simulate

# (x [T, D], ids [T, K], weights [T, K], maps [ranks, E], part, group) -> [T, D]
Dispatch = Callable[[Tensor, Tensor, Tensor, Tensor, Part, Group], Tensor]


def exchange(ranks: Sequence[ExchangeInputs], dispatch: Dispatch = through_all_to_all) -> list[Exchanged]:
    """All ranks, as threads; or one of several, which is this process's among those of torch.distributed."""
    if len(ranks) == ranks[0].ranks:
        return simulate(len(ranks), lambda group: on_rank(ranks[group.rank], group, dispatch))
    return [on_rank(inputs, Process(), dispatch) for inputs in ranks]


def on_rank(inputs: ExchangeInputs, group: Group, dispatch: Dispatch) -> Exchanged:
    """The routed sum of a rank's own tokens, and what its experts were given; a shared expert stays at home."""
    own, arrived = inputs.maps[inputs.rank], []

    def part(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        arrived.append(Arrived(x, local_ids(ids, own)))
        return routed_experts(x, inputs.mlp, inputs.tensors, ids, weights, expert_map=own)

    output = dispatch(inputs.x, inputs.ids, inputs.weights, inputs.maps, part, group)
    if inputs.shared is not None:
        shared = mlp(inputs.x, inputs.shared, inputs.shared_tensors, "shared")
        output = (output.to(wide(output.dtype)) + shared).to(output.dtype)
    return Exchanged(output, *arrived)
