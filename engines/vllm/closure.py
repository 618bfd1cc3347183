"""Gemma 4's router as vLLM builds it: the expert layer owns a routing function that reaches back for a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import LogitsSpec, RouteInputs, RouterHandle, RouterSpec, Routing, RoutingSpec
from moe_conformance.engines.vllm import runtime
from moe_conformance.errors import Unsupported


class Router(nn.Module):
    """vLLM's own modules, and a forward that asks the expert layer for its routing function at each call.

    Nothing of the adapter stands between: a copy of this module calls what the copied expert layer holds, whether that
    is a method of a copied router or a function that still knows the first one.
    """

    def __init__(self, parts: nn.ModuleDict, top_k: int) -> None:
        super().__init__()
        self.parts = parts
        self.top_k = top_k

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.parts["moe"].experts if "moe" in self.parts else self.parts["experts"]
        # What vLLM's projection puts out is float32 whatever the model's dtype is.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        hidden = logits  # Gemma 4's routing function is given hidden states, as all are, and does not use them.
        return experts.router.custom_routing_function(
            hidden_states=hidden, gating_output=logits, topk=self.top_k, renormalize=True
        )


def is_gemma4(routing: RoutingSpec) -> bool:
    return routing == RoutingSpec(routing.top_k, renormalize="sum", per_expert_scale=True)


def router_module(spec: RouterSpec) -> RouterHandle:
    """The routing function of Gemma 4, with the module that holds per_expert_scale [E]."""
    if spec.logits.kind != "gemma4" or not is_gemma4(spec.routing):
        raise Unsupported(f"router_module: {spec.routing}; the routers of vLLM's other models have no parameters")
    from vllm.model_executor.models import gemma4

    values = {
        "num_experts": spec.num_experts,
        "top_k_experts": spec.routing.top_k,
        "hidden_size": spec.hidden_size,
        "rms_norm_eps": spec.logits.norm_eps,
    }
    dtype = str(spec.dtype).removeprefix("torch.")
    with runtime.gemma4_config(values, dtype) as config, runtime.building(config, spec.dtype):
        text = config.model_config.hf_text_config
        if hasattr(gemma4, "Gemma4MoE"):
            parts = {"moe": gemma4.Gemma4MoE(text, prefix="model.layers.0.moe")}
        else:
            layer = gemma4.Gemma4DecoderLayer(text, cache_config=config.cache_config, prefix="model.layers.0")
            # Routing starts after the projection, whose parameters are of a class that nobody can deep-copy.
            layer.router.proj = nn.Identity()
            parts = {"router": layer.router, "experts": layer.experts}
    module = Router(nn.ModuleDict(parts), spec.routing.top_k)
    name = next(name for name, _ in module.named_parameters() if name.endswith("per_expert_scale"))
    return RouterHandle(module, "logits", {"router.per_expert_scale": name})


@torch.no_grad()
def routing_function(routing: RoutingSpec, scale: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """What vLLM's Gemma 4 hands to its experts to route by, with this per_expert_scale [E]."""
    handle = router_module(RouterSpec(LogitsSpec("gemma4"), routing, len(scale), 32, torch.float32))
    handle.module.get_parameter(handle.tensors["router.per_expert_scale"]).copy_(scale)
    experts: Any = handle.module.get_submodule("parts")
    experts = experts["moe"].experts if "moe" in experts else experts["experts"]
    function: Callable[..., tuple[Tensor, Tensor]] = experts.router.custom_routing_function
    return function


@torch.no_grad()
def route(inputs: RouteInputs) -> Routing:
    """The torch routing function that vLLM's Gemma 4 calls on a CPU."""
    experts = inputs.logits.shape[-1]
    spec = RouterSpec(LogitsSpec("gemma4"), inputs.routing, experts, 32, torch.float32)
    handle = router_module(spec)
    parameter = handle.module.get_parameter(handle.tensors["router.per_expert_scale"])
    parameter.copy_(inputs.tensors["router.per_expert_scale"])
    weights, ids = handle.module(inputs.logits)
    return Routing(ids, weights)
