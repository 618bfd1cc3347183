"""vLLM's expert-parallel load balancer: its maps, the kernel that chooses a copy and counts, its sum over copies."""

from __future__ import annotations

import contextlib
import inspect
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import Replicated, ReplicateInputs
from moe_conformance.engines.vllm import device, interpreted, runtime
from moe_conformance.engines.vllm.refusing import refusals

_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"


def replicate(inputs: ReplicateInputs) -> Replicated:
    """One step of one layer on one rank: maps are committed, a router maps and counts, the balancer adds up."""
    runtime.start()
    interpreted.require()
    state = state_of(inputs.physical_to_logical, inputs.experts)
    ids = physical_ids(inputs.ids, state, inputs.tokens)
    return Replicated(ids, _load(state))


def module() -> ModuleType:
    """The module of the kernel, as on a GPU: on a CPU vLLM maps nothing. Raises ImportError where there is none."""
    found = interpreted.read_as_gpu(_ROUTER)
    if not hasattr(found, "eplb_map_to_physical_and_record"):
        raise ImportError("no eplb_map_to_physical_and_record")
    return found


def state_of(physical_to_logical: Tensor, experts: int) -> Any:
    """What the balancer keeps of a model of one MoE layer, with its maps of these copies."""
    from vllm.distributed.eplb import eplb_state

    copies, where = len(physical_to_logical), physical_to_logical.device
    state = SimpleNamespace(
        physical_to_logical_map=torch.full((1, copies), -1, device=where),
        # As many slots as its own state has for an expert.
        logical_to_physical_map=torch.full((1, experts, 1024), -1, device=where),
        logical_replica_count=torch.zeros((1, experts), dtype=torch.int64, device=where),
        expert_load_pass=torch.zeros((1, copies), dtype=torch.int32, device=where),
        expert_load_window=torch.zeros((1, 1, copies), dtype=torch.int32, device=where),
        model=SimpleNamespace(
            num_logical_experts=experts, num_moe_layers=1, num_physical_experts=copies, num_expert_groups=1
        ),
        model_name="one layer",
        rebalanced=False,
        # 0.19 asks whether experts are under way to other ranks.
        pending_global_ready_check=False,
        ep_buffer_ready=False,
        eplb_stats=None,
        num_unpadded_tokens_tensors=[torch.zeros((), dtype=torch.int32, device=where)],
    )
    eplb_state._commit_eplb_maps(state, physical_to_logical[None])
    return state


def physical_ids(ids: Tensor, state: Any, tokens: int) -> Tensor:
    """The router's mapping of logical ids, which also counts them in the state."""
    wanted = inspect.signature(module().eplb_map_to_physical_and_record).parameters
    unpadded = state.num_unpadded_tokens_tensors[0]
    unpadded.fill_(tokens)
    offered = {
        "topk_ids": ids,
        "expert_load_view": state.expert_load_pass[0],
        "logical_to_physical_map": state.logical_to_physical_map[0],
        "logical_replica_count": state.logical_replica_count[0],
        "record_enabled": torch.ones((), dtype=torch.bool, device=ids.device),
        "num_unpadded_tokens": unpadded,
    }
    with interpreted.library():
        found: Tensor = module().eplb_map_to_physical_and_record(
            **{name: value for name, value in offered.items() if name in wanted}
        )
    return found


def _load(state: Any) -> Tensor:
    """The load of each logical expert, [E], as the balancer hands it to its policy at the end of a step."""
    from vllm.distributed.eplb import eplb_state

    event = lambda *_, **__: SimpleNamespace(record=lambda *_: None)  # noqa: E731  of a GPU's stream
    with runtime.gemma4_config({}) as config, contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(eplb_state, "CpuGpuEvent", event, create=True))
        stack.enter_context(patch.object(torch.cuda, "Event", event))
        balancer = eplb_state.EplbState(config.parallel_config, torch.device(device.kind()))
    balancer.model_states = {"one layer": state}
    # What add_model sets.
    balancer.num_valid_physical_experts = state.model.num_physical_experts
    balancer.expert_load_window_size = 1
    balancer.expert_rearrangement_step_interval = 1
    # The policy runs in a thread of its own then, which is not started here.
    balancer.is_async = True
    with refusals():
        balancer.step()
    load: Tensor = state.eplb_stats.global_expert_load_window[0]
    return load
