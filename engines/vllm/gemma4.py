"""Gemma 4's routing as vLLM has it: a function that its model hands to the expert layer, and that reaches back for a
parameter of the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import RouteInputs, Routing, RoutingSpec
from moe_conformance.engines.vllm import runtime


def is_gemma4(routing: RoutingSpec) -> bool:
    return routing == RoutingSpec(routing.top_k, renormalize="sum", per_expert_scale=True)


@torch.no_grad()
def routing_function(routing: RoutingSpec, scale: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """What vLLM's Gemma 4 hands to its experts to route by, with this per_expert_scale [E]."""
    from vllm.model_executor.models import gemma4

    values = {"num_experts": len(scale), "top_k_experts": routing.top_k}
    with runtime.gemma4_config(values) as config, runtime.building(config, torch.float32):
        text = config.model_config.hf_text_config
        if hasattr(gemma4, "Gemma4MoE"):
            module: Any = gemma4.Gemma4MoE(text, prefix="model.layers.0.moe")
        else:
            module = gemma4.Gemma4DecoderLayer(text, cache_config=config.cache_config, prefix="model.layers.0")
    next(value for name, value in module.named_parameters() if name.endswith("per_expert_scale")).copy_(scale)
    function: Callable[..., tuple[Tensor, Tensor]] = module.experts.router.custom_routing_function
    return function


def route(inputs: RouteInputs) -> Routing:
    """The torch routing function that vLLM's Gemma 4 calls on a CPU."""
    function = routing_function(inputs.routing, inputs.tensors["router.per_expert_scale"])
    # What vLLM's projection puts out is float32 whatever the model's dtype is.
    logits = inputs.logits.float()
    weights, ids = function(
        hidden_states=logits,  # which Gemma 4's function is given, as all are, and does not use
        gating_output=logits, topk=inputs.routing.top_k, renormalize=True,
    )  # fmt: skip
    return Routing(ids, weights)
