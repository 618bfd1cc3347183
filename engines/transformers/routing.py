"""Routers of real families, given logits or as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.engines.transformers.families import DEEPSEEK_V2, GEMMA4, MIXTRAL
from moe_conformance.judging.inputs import poison_

ROUTERS = {"softmax_topk": DEEPSEEK_V2, "softmax_topk_renorm": MIXTRAL, "gemma4": GEMMA4}


def methods() -> frozenset[str]:
    """The methods for which the installed transformers has a router class (most families: since 5.0)."""
    return frozenset(method for method, family in ROUTERS.items() if family.has(family.config, family.router))


class _Projection(TorchFunctionMode):
    """Inside, a linear map gives these logits, in the dtype the router computes its projection in.

    Multiplying by an identity instead would spoil a row that holds an infinity.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self.logits.to(args[0].dtype)
        return func(*args, **(kwargs or {}))


class GivenLogits(nn.Module):
    """A real router whose projection yields the logits of the case, whatever the hidden states are."""

    def __init__(self, router: nn.Module, logits: Tensor) -> None:
        super().__init__()
        self.router, self.logits = router, logits

    def forward(self, hidden: Tensor) -> Any:
        with _Projection(self.logits):
            return self.router(hidden)


def route(inputs: RouteInputs) -> Routing:
    family = ROUTERS[inputs.method]
    tokens, experts = inputs.logits.shape
    config = family.make_config(experts, inputs.top_k, hidden=1)
    router = family.get(family.router)(config).to(inputs.logits.device, inputs.logits.dtype).eval()
    if inputs.per_expert_scale is not None:
        router.per_expert_scale = nn.Parameter(inputs.per_expert_scale, requires_grad=False)
    with torch.no_grad():
        _, weights, ids = GivenLogits(router, inputs.logits)(inputs.logits.new_zeros(tokens, 1))
    return Routing(ids, weights)


class WeightsAndIds(nn.Module):
    """A real router that leaves out the scores it returns first."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, ids = self.router(hidden)
        return weights, ids


def router_module(spec: RouterSpec) -> RouterHandle:
    """The router of a family with the spec's method; its parameters are poisoned until loaded."""
    family = ROUTERS[spec.method]
    config = family.make_config(spec.num_experts, spec.top_k, spec.hidden_size, rms_norm_eps=spec.norm_eps)
    router = family.get(family.router)(config).to(spec.dtype).eval().requires_grad_(False)
    for parameter in router.parameters():
        poison_(parameter.data)
    tensors = {"proj": f"router.{family.projection}"}
    tensors |= {
        name: f"router.{name}" for name, _ in router.named_parameters() if name in ("scale", "per_expert_scale")
    }
    return RouterHandle(WeightsAndIds(router), "hidden", tensors)
