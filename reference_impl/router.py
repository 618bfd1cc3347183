"""The router: from the layer's input to logits, and a router as the module that engines build."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.judging.inputs import poison_
from moe_conformance.model.specs import LogitsSpec
from moe_conformance.reference_impl.routing import in_precision, named, route


def router_logits(
    x: Tensor, spec: LogitsSpec, tensors: Mapping[str, Tensor], *, state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Logits [T, classes] of x [T, H], and the state [T, R] for the next MoE layer where the router passes one on.

    tensors: by the names of `LayerSpec.tensors`, converted to the dtype of the computation. state: what the router of
    the previous MoE layer returned, None in the first. Raises InputError for a tensor that is missing or does not fit.
    Sources: transformers Gemma4TextRouter ("gemma4"), ZayaRouter ("zaya").
    """
    x = in_precision(x, spec.dtype)

    def read(name: str, *shape: int | None) -> Tensor:
        return named(tensors, name, *shape).to(x.dtype)

    next_state = None
    if spec.kind == "gemma4":
        x = F.rms_norm(x, x.shape[1:], eps=spec.norm_eps) * read("router.scale", x.shape[1]) * x.shape[1] ** -0.5
    elif spec.kind == "zaya":
        x, next_state = zaya_hidden(x, spec, read, state)
    bias = read("router.bias", None) if spec.bias else None
    return F.linear(x, read("router.proj", None, x.shape[1]), bias), next_state


def zaya_hidden(
    x: Tensor, spec: LogitsSpec, read: Callable[..., Tensor], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What ZAYA1's router projects to logits, and what it passes on, [T, R] both; read: a tensor by name and shape."""
    width = spec.width
    x = F.linear(x, read("router.down.weight", width, x.shape[1]), read("router.down.bias", width))  # [T, R]
    if spec.takes_state and state is not None:
        x = x + state * read("router.state_scale", width)
    hidden = F.rms_norm(x, (width,), read("router.norm", width), eps=spec.norm_eps)
    for layer in ("fc1", "fc2"):
        weight = read(f"router.{layer}.weight", width, width)
        hidden = F.gelu(F.linear(hidden, weight, read(f"router.{layer}.bias", width)))
    return hidden, x


class FusedExperts(nn.Module):
    """Stands for a fused expert layer that is handed its routing function and calls it."""

    def __init__(self, routing_function: Callable[[Tensor], Routing]) -> None:
        super().__init__()
        self.routing_function = routing_function

    def forward(self, logits: Tensor) -> Routing:
        return self.routing_function(logits)


class Router(nn.Module):
    """A router as engines build it: the expert layer owns a function that reaches back for the router's parameters.

    That function is a bound method, which reads `self.per_expert_scale` when it is called. A local function that
    names the Parameter, or even `self`, would keep the old object through functional_call, replacement or deepcopy.

    forward(hidden [T, H]) returns (weights [T, K], ids [T, K]). Parameters are poisoned until loaded.
    """

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = _unloaded(spec.num_experts, spec.hidden_size, dtype=spec.dtype)
        if spec.method == "gemma4":
            self.scale = _unloaded(spec.hidden_size, dtype=spec.dtype)
            self.per_expert_scale = _unloaded(spec.num_experts, dtype=spec.dtype)
        self.experts = FusedExperts(self.select)

    def select(self, logits: Tensor) -> Routing:
        scale = self.per_expert_scale if self.spec.method == "gemma4" else None
        return route(RouteInputs(logits, self.spec.top_k, self.spec.method, scale))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gemma4 = self.spec.method == "gemma4"
        tensors = {"router.proj": self.proj} | ({"router.scale": self.scale} if gemma4 else {})
        spec = LogitsSpec("gemma4" if gemma4 else "linear", norm_eps=self.spec.norm_eps)
        ids, weights = self.experts(router_logits(hidden, spec, tensors)[0])
        return weights, ids


def _unloaded(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(poison_(torch.empty(shape, dtype=dtype)), requires_grad=False)


def build_router(spec: RouterSpec) -> RouterHandle:
    """The router of `spec` with its tensors by canonical name."""
    module = Router(spec)
    return RouterHandle(module, "hidden", {name: name for name, _ in module.named_parameters()})
