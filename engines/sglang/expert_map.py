"""Where SGLang puts each expert under expert parallelism: the map that its dispatcher makes at its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import ExpertMapSpec, Unsupported
from moe_conformance.engines.sglang import device, runtime
from moe_conformance.engines.sglang.refusing import refusals


def expert_map(spec: ExpertMapSpec) -> Tensor:
    """[E] int32. One rank has no map in SGLang: local ids are global ids."""
    dispatcher = dispatcher_of(spec.experts, spec.rank, spec.ranks)
    if dispatcher.local_expert_mapping is None:
        return torch.arange(spec.experts, dtype=torch.int32)
    found: Tensor = dispatcher.local_expert_mapping
    return found


def dispatcher_of(experts: int, rank: int, ranks: int) -> Any:
    """A dispatcher of this rank that has dispatched a batch of no tokens."""
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    runtime.start()
    if experts % ranks:
        raise Unsupported(f"SGLang's expert layer: assert {experts} experts % {ranks} ranks == 0")
    with runtime.as_rank(ep=(rank, ranks)), refusals():
        config = MoeRunnerConfig(num_experts=experts, num_local_experts=experts // ranks, num_fused_shared_experts=0)
        dispatcher = StandardDispatcher(config)
        where = device.kind()
        none = StandardTopKOutput(
            torch.empty(0, 1, device=where), torch.empty(0, 1, dtype=torch.int32, device=where), None
        )
        dispatcher.dispatch(torch.empty(0, 1, device=where), none)
    return dispatcher


def local_ids(ids: Tensor, local: Tensor) -> Tensor:
    """[T, K]: what a dispatcher with this map hands to its experts."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    dispatcher = dispatcher_of(len(local), 0, 1)
    dispatcher.local_expert_mapping = local
    rows, weights = ids.new_zeros(len(ids), 1, dtype=torch.float32), torch.zeros(ids.shape, device=ids.device)
    with runtime.as_rank(), refusals():
        found: Tensor = dispatcher.dispatch(rows, StandardTopKOutput(weights, ids, None)).topk_output.topk_ids
    return found
