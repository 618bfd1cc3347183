"""The router: from the layer's input to logits, and a router as the module that engines build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

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
    """The hidden state that ZAYA1's router projects to logits, and the one it passes on, both [T, R].

    read: a tensor by name and shape.
    """
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
    """Stands in for a fused expert layer that is given its routing function and calls it."""

    def __init__(self, routing_function: Callable[..., Routing]) -> None:
        super().__init__()
        self.routing_function = routing_function

    def forward(self, logits: Tensor, **batch: Any) -> Routing:
        return self.routing_function(logits, **batch)


class Router(nn.Module):
    """A router as engines build it: the expert layer owns a function that reaches back for the router's parameters.

    That function is a bound method, which reads `self.per_expert_scale` when it is called. A local function that
    names the Parameter, or even `self`, would keep the old object through functional_call, replacement or deepcopy.

    Tensors have their canonical names without "router.". The selection bias, in float32, and the table are buffers, the
    others parameters. All are poisoned until loaded.
    """

    route = staticmethod(route)  # an engine with a kernel for this overrides it

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in spec.tensors().items():
            *path, last = own_name(name).split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if name in BUFFERS:
                owner.register_buffer(last, poison_(torch.empty(shape, dtype=BUFFERS[name])))
            else:
                unloaded = poison_(torch.empty(shape, dtype=spec.dtype))
                owner.register_parameter(last, nn.Parameter(unloaded, requires_grad=False))
        self.experts = FusedExperts(self.select)

    def tensors(self) -> dict[str, Tensor]:
        """Canonical name -> tensor, as they are now."""
        return {name: attrgetter(own_name(name))(self) for name in self.spec.tensors()}

    def select(self, logits: Tensor, *, token_ids: Tensor | None = None, sequences: int = 1) -> Routing:
        """Route with the tensors' current values."""
        return self.route(RouteInputs(logits, self.spec.routing, self.tensors(), token_ids, sequences))

    def forward(self, hidden: Tensor, *, state: Tensor | None = None, **batch: Any) -> tuple[Tensor, Tensor]:
        """Weights and ids, [T, K] each, of hidden [T, H]; state as `router_logits`, batch as `select` takes them."""
        ids, weights = self.experts(router_logits(hidden, self.spec.logits, self.tensors(), state=state)[0], **batch)
        return weights, ids


# Tensors that are not trained by gradient, and their dtype, which does not follow the model's.
BUFFERS = {"router.selection_bias": torch.float32, "router.table": torch.int64}


def own_name(name: str) -> str:
    """What the module calls the tensor of this canonical name."""
    return name.removeprefix("router.")


def build_router(spec: RouterSpec) -> RouterHandle:
    """The router of `spec` with its tensors by canonical name."""
    return RouterHandle(Router(spec), "hidden", {name: own_name(name) for name in spec.tensors()})
