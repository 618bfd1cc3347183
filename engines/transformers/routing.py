"""Routers of real families, given logits, or by themselves as modules."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_conformance.engine import (
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    Unsupported,
    called_by_engine,
    poison_,
)
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.filling import fill, source
from moe_conformance.engines.transformers.matching import (
    UNSEEN,
    for_router,
    for_router_module,
    router_of,
    router_tensors,
)


class GivenLogits:
    """Within this context the router's projection returns these logits, whatever the hidden states are.

    Multiplying by an identity instead would spoil a row that holds an infinity.
    """

    def __init__(self, moe: Any, logits: Tensor) -> None:
        self.router, self.logits = router_of(moe), logits

    def __enter__(self) -> GivenLogits:
        real, mode = self.router.forward, _Projection(self.logits)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return real(*args, **kwargs)

        self.patch = patch.object(self.router, "forward", forward)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


class _Projection(TorchFunctionMode):
    """The linear map to as many columns as the logits have gives the logits, in the dtype it is computed in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    @called_by_engine
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[1].shape[0] == self.logits.shape[1]:
            return self.logits.to(args[0].dtype).view(*args[0].shape[:-1], self.logits.shape[1])
        return func(*args, **(kwargs or {}))


def route(inputs: RouteInputs) -> Routing:
    """Ids and weights as the block of a family with that router hands them to its experts."""
    logits, routing = inputs.logits, inputs.routing
    if inputs.fused_shared is not None:
        raise Unsupported("route: transformers computes shared experts apart from the routed ones")
    tokens, classes = logits.shape
    experts = classes - routing.identity_experts - routing.skip_expert - routing.shared_classes
    table = inputs.tensors.get("router.table")
    block = for_router(routing, experts, 0 if table is None else len(table), name_of(logits.dtype)).block()
    fill(block, inputs.tensors, logits.dtype, logits.device)
    shape = (inputs.sequences, tokens // inputs.sequences)
    token_ids = None if inputs.token_ids is None else inputs.token_ids.view(shape)
    with Tap(block.moe, None, stop=True) as tap, GivenLogits(block.moe, logits), torch.no_grad():
        block(logits.new_zeros(*shape, UNSEEN), token_ids, None)
    assert tap.seen is not None
    return Routing(tap.seen.ids, tap.seen.weights.float())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class WeightsAndIds(nn.Module):
    """A real router whose answer is reduced to weights and ids: leading scores and trailing extras are dropped."""

    def __init__(self, router: nn.Module, is_sequence: bool) -> None:
        super().__init__()
        self.router, self.is_sequence = router, is_sequence

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, ids, *_ = self.router(hidden.unsqueeze(0) if self.is_sequence else hidden)
        return weights, ids


def router_module(spec: RouterSpec, device: str) -> RouterHandle:
    """A family's router that computes this spec; its tensors are poisoned until loaded."""
    if spec.logits.takes_state:
        raise Unsupported("router_module: ZAYA's router takes the state of the one before as a second argument")
    found = for_router_module(spec.logits, spec.routing, spec.num_experts, spec.hidden_size, name_of(spec.dtype))
    block = found.block()
    router = router_of(block.moe)
    names = router_tensors(block)
    router = copy.deepcopy(router).to_empty(device=device).eval().requires_grad_(False)
    wanted, loaded = spec.tensors(), {}
    for name, in_block in zip(router.state_dict(), names, strict=True):
        made_of = source(block.moe, in_block)
        tensor = router.get_parameter(name) if name in dict(router.named_parameters()) else router.get_buffer(name)
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if block.stays_in_float32(in_block) else spec.dtype)
        if made_of.name in wanted:
            loaded[made_of.name] = f"router.{name}"
            poison_(tensor.data)
        else:
            tensor.data.zero_()  # a selection bias that the spec does not have
    return RouterHandle(WeightsAndIds(router, spec.logits.kind == "zaya"), "hidden", loaded)
