"""Routers of vLLM's models, from hidden states on: the block of a model that has such a router, run up to its kernel.

The block is the model's own, filled by its own loader. Its projection is as it was loaded: what vLLM packs afterwards
for a CPU is a copy, and packed anew whenever weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_conformance.engine import (
    LayerSpec,
    RouterHandle,
    RouterSpec,
    Unsupported,
    called_by_engine,
)
from moe_conformance.engines import servers
from moe_conformance.engines.vllm import block, models, registry
from moe_conformance.engines.vllm.refusing import refusals

# Families that are asked first, by model type: those that a method is known by.
_FIRST = ("deepseek_v2", "deepseek_v3", "deepseek_v4", "gemma4_text", "gpt_oss", "mixtral", "olmoe")


class Router(nn.Module):
    """A block that ends where its router has answered."""

    def __init__(self, found: block.Block) -> None:
        super().__init__()
        self.root = found.root
        self._block = _Kept(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """Copies share what belongs to the process: its groups, and the config it was started with.

        Raises Unsupported where the block holds on to something else that Python cannot copy.
        """
        for module in self.modules():
            memo |= {id(one): one for one in vars(module).values() if isinstance(one, ProcessGroup)}
        twin = self.__new__(Router)
        memo[id(self)] = twin
        try:
            twin.__dict__ |= copy.deepcopy(self.__dict__, memo)
        except TypeError as error:
            raise Unsupported(f"router_module: {self._block.of.name} cannot be copied: {error}") from error
        return twin

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        experts = next(module for module in self.root.modules() if models.is_experts(module))
        of = self._block.of
        with of.running(), _as_layer(of.config, experts), _stopping(experts, of.scale), refusals():
            try:
                self.root(hidden)
            except _Answer as answer:
                return answer.weights, answer.ids
        raise Unsupported(f"router_module: {type(self.root).__name__} asks no router in a place where it can be heard")


class _Kept:
    """What is no part of the module, and so the same in a copy of it."""

    def __init__(self, of: block.Block) -> None:
        self.of = of

    def __deepcopy__(self, _: Any) -> _Kept:
        return self


class _Answer(Exception):
    def __init__(self, weights: Tensor, ids: Tensor) -> None:
        super().__init__("the router has answered")
        self.weights, self.ids = weights, ids


@contextlib.contextmanager
def _as_layer(config: Any, experts: Any) -> Iterator[None]:
    """Inside, a step in which the block's expert layer is this one, which may be a copy of that it was built with."""
    from vllm.forward_context import create_forward_context, override_forward_context

    context = create_forward_context(None, config)
    layers = dict.fromkeys(context.no_compile_layers, experts)
    with patch.object(context, "no_compile_layers", layers), override_forward_context(context):
        yield


@contextlib.contextmanager
def _stopping(experts: Any, scale: float) -> Iterator[None]:
    """Inside, the answer of the layer's router is raised, its weights times the scale."""
    with contextlib.ExitStack() as stack:
        # Kernels that route by themselves are not there yet; the layer has a router all the same.
        for method in _methods(experts):
            if hasattr(type(method), "is_monolithic"):
                stack.enter_context(patch.object(type(method), "is_monolithic", False))
        for place in block.routing_places(experts):
            stack.enter_context(patch.object(place, "select_experts", _raising(place.select_experts, scale)))
        try:
            yield
        finally:
            # What shared experts have put out, nobody takes.
            for shared in _shared(experts):
                if isinstance(getattr(shared, "_output", None), list):
                    shared._output[:] = [None] * len(shared._output)


def _shared(experts: Any) -> Iterator[Any]:
    """What computes shared experts beside the routed ones: the layer's, or in older releases its runner's."""
    for owner in (experts, getattr(experts, "runner", None)):
        if (found := getattr(owner, "_shared_experts", None)) is not None:
            yield found


def _methods(experts: Any) -> Iterator[Any]:
    """What the layer, its weights and its runner compute with."""
    for owner in (experts, *(getattr(experts, name, None) for name in ("routed_experts", "runner"))):
        yield from filter(None, (getattr(owner, name, None) for name in ("quant_method", "_quant_method")))


def _raising(real: Any, scale: float) -> Any:
    @called_by_engine
    def select_experts(*args: Any, **kwargs: Any) -> NoReturn:
        weights, ids, *_ = real(*args, **kwargs)
        raise _Answer(weights if scale == 1 else weights.float() * scale, ids)

    return select_experts


@torch.no_grad()
def router_module(spec: RouterSpec) -> tuple[RouterHandle, str]:
    """The router of the first model that has it, and the name of its block.

    Raises Unsupported with the reason of every such model, or where no family's record says this router.
    """
    reasons = []
    types = sorted(registry.model_types(), key=lambda name: (name not in _FIRST, name))
    for setting, layer, config in servers.routers(spec, types):
        try:
            return _handle(spec, setting, layer, config)
        except Unsupported as refusal:
            reasons.append(f"{setting.record.slug}: {refusal}")
    raise Unsupported(
        "; ".join(reasons) or f"router_module: no model of vLLM's routes by {spec.logits}, {spec.routing}"
    )


def _handle(spec: RouterSpec, setting: Any, layer: LayerSpec, config: dict[str, Any]) -> tuple[RouterHandle, str]:
    tensors = servers.router_tensors(spec, layer, "vllm")
    found = block.loaded(config, setting.layer, spec.dtype, tensors, runs=False)
    _as_loaded(found.root)
    router = Router(found)
    held = {name: servers.holder(router, tensors[name]) for name in spec.tensors()}
    if left := [name for name, holder in held.items() if holder is None]:
        raise Unsupported(f"it keeps {', '.join(left)} otherwise than as one whole tensor")
    return RouterHandle(router, "hidden", {name: holder or "" for name, holder in held.items()}), found.name


def _as_loaded(root: nn.Module) -> None:
    """Projections compute with the weights that they were loaded with.

    Their parameters are of classes that nobody can copy: they become plain ones, the same objects. What a block has
    under two names is listed under one, for torch.func.functional_call leaves such a module with the new value.
    """
    seen = set()
    layers = [module for module in root.modules() if models.is_experts(module)]
    # Which is no part of the block where a runner, which is none, has it.
    beside = [layer for one in layers for shared in _shared(one) if (layer := getattr(shared, "_layer", None))]
    for parent in dict.fromkeys(module for top in (root, *beside) for module in top.modules()):
        for name, module in list(parent.named_children()):
            if module in seen:
                del parent._modules[name]
                parent.__dict__[name] = module
            seen.add(module)
        for parameter in parent.parameters(recurse=False):
            if isinstance(parameter, nn.Parameter):
                parameter.__class__ = nn.Parameter
        if hasattr(parent, "quant_method") and isinstance(getattr(parent, "weight", None), Tensor):
            parent.cpu_linear = torch.nn.functional.linear  # as vLLM's own, where nothing is packed
