"""SGLang's expert-parallel load balancer: its maps, the choice of a copy, and the load that its recorder counts."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import Replicated, ReplicateInputs
from moe_conformance.engines.sglang import runtime
from moe_conformance.engines.sglang.refusing import refusals

NAMES = "select_experts, _topk_ids_logical_to_physical_dynamic, _SelectExpertsSinglePassGatherer"


def replicate(inputs: ReplicateInputs) -> Replicated:
    """One step of one layer on one rank, as behind a router: ids are mapped, padding rows masked, pairs counted."""
    runtime.start()
    metadata = metadata_of(inputs.physical_to_logical, inputs.experts)
    found, recorded = physical_ids(inputs.ids.int(), metadata, inputs.tokens)
    return Replicated(found, _load(recorded, metadata))


def physical_ids(ids: Tensor, metadata: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids of physical experts, and those that the recorder is given."""
    topk = import_module("sglang.srt.layers.moe.topk")
    layer = {"layer_id": 0} if "layer_id" in signature(topk.TopKConfig).parameters else {}
    dispatch = import_module("sglang.srt.eplb.expert_location_dispatch")
    info = dispatch.ExpertLocationDispatchInfo(
        ep_dispatch_algorithm="dynamic",
        partial_logical_to_rank_dispatch_physical_map=None,
        partial_logical_to_all_physical_map=metadata.logical_to_all_physical_map[0],
        partial_logical_to_all_physical_map_num_valid=metadata.logical_to_all_physical_map_num_valid[0],
        num_physical_experts=metadata.num_physical_experts,
        rank_invariant=True,
    )
    with refusals():
        found, _, recorded = topk._post_process_topk_ids(
            topk_ids=ids.clone(),
            topk_weights=torch.zeros(ids.shape, device=ids.device),
            topk_config=topk.TopKConfig(top_k=ids.shape[-1], **layer),
            router_logits=torch.zeros(len(ids), metadata.num_logical_experts, device=ids.device),
            layer_id=0,
            num_token_non_padded=torch.tensor(tokens, dtype=torch.int32, device=ids.device),
            expert_location_dispatch_info=info,
        )
    return found, recorded


def metadata_of(physical_to_logical: Tensor, experts: int) -> Any:
    """SGLang's maps of one layer with these copies, on one rank."""
    location = import_module("sglang.srt.eplb.expert_location")
    copies = physical_to_logical[None]
    to_physical = location._compute_logical_to_all_physical_map(
        physical_to_logical_map=copies, num_logical_experts=experts, ep_size=1, moe_ep_rank=0
    )
    return location.ExpertLocationMetadata._init_raw(
        ep_size=1, physical_to_logical_map=copies, logical_to_all_physical_map=to_physical, moe_ep_rank=0
    )


def _load(recorded: Tensor, metadata: Any) -> Tensor:
    """[E]: what the recorder of a step counted, added up over copies as for the balancer."""
    distribution = import_module("sglang.srt.eplb.expert_distribution")
    gatherer = distribution._SelectExpertsSinglePassGatherer(metadata, 0)
    gatherer.on_select_experts(0, recorded)
    counted = gatherer.collect()["global_physical_count"]
    found: Tensor = distribution._convert_global_physical_count_to_logical_count(
        counted[None],
        1,
        metadata.num_logical_experts,
        metadata.physical_to_logical_map,
    )[0, 0]
    return found
