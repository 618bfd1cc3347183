"""Engines with several copies of one expert that lose, double or miscount pairs."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import Replicated, ReplicateInputs, ShardInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.parallel import experts as parallel
from moe_conformance.reference_impl.parallel.expert_map import held_experts, physical_ids, replicate


class CopyByRank(Faulty):
    """Each rank takes a copy of its own choice, though all see the same pairs: some are computed twice, some never."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        def nearest(ids: Tensor, physical_to_logical: Tensor, experts: int) -> Tensor:
            every_expert = torch.arange(experts).expand(inputs.ep_rank + 1, -1)
            copies = physical_ids(every_expert, physical_to_logical, experts)[-1]  # [E]
            return torch.where(ids < 0, -1, copies[ids.clamp(min=0)])

        with patch.object(parallel, "physical_ids", nearest):
            return super().shard(inputs)


class FirstCopiesDoNotMove(Faulty):
    """Physical expert e, for e below E, keeps the weights of expert e, wherever a rearrangement put them."""

    def shard(self, inputs: ShardInputs) -> Tensor:
        if inputs.physical_to_logical is None:
            return super().shard(inputs)
        take_experts, physical = parallel.take_experts, held_experts(inputs.expert_map)

        def stale(tensors: parallel.Tensors, held: Tensor) -> dict[str, Tensor]:
            experts = inputs.whole.experts
            return take_experts(tensors, torch.where(physical < experts, physical, held))

        with patch.object(parallel, "take_experts", stale):
            return super().shard(inputs)


class IdsStayLogical(Faulty):
    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        return Replicated(inputs.ids, super().replicate(inputs).load)


class NobodyGetsACopy(Faulty):
    """-1 is looked up like any id."""

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        ids = physical_ids(inputs.ids % inputs.experts, inputs.physical_to_logical, inputs.experts)
        return Replicated(ids, super().replicate(inputs).load)


class LoadCountedPhysically(Faulty):
    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        ids, _ = super().replicate(inputs)
        real = ids[: inputs.tokens]
        load = real[real >= 0].bincount(minlength=len(inputs.physical_to_logical))
        return Replicated(ids, load[: inputs.experts])


class PaddingIsLoad(Faulty):
    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        return replicate(replace(inputs, tokens=len(inputs.ids)))


_OUTPUT = "copies_and_moves_leave_the_output"
_CHOICE = "each_pair_goes_to_a_copy_of_its_expert"
_LOAD = "load_counts_real_pairs_by_logical_expert"

MUTANTS = (
    Mutant(CopyByRank, "eplb", "each rank chooses copies for itself", ("shard-replicas", _OUTPUT)),
    Mutant(
        FirstCopiesDoNotMove,
        "eplb",
        "a rearrangement moves ids and leaves weights where they were",
        ("shard-replicas", _OUTPUT),
    ),
    Mutant(
        IdsStayLogical,
        "eplb",
        "logical ids are taken for physical ones",
        ("replicate-choice-moved", _CHOICE),
    ),
    Mutant(NobodyGetsACopy, "eplb", "-1 becomes a copy of the last expert", ("replicate-choice-dropped", _CHOICE)),
    Mutant(
        LoadCountedPhysically,
        "eplb",
        "load is counted by physical expert",
        ("replicate-load-two-copies", _LOAD),
    ),
    Mutant(
        PaddingIsLoad,
        "eplb",
        "padding rows count as load (vllm#38128)",
        ("replicate-load-two-copies", _LOAD),
    ),
)
