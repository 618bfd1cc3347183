"""Routers of SGLang's models, from hidden states on: a block that has such a router, run up to its experts."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moe_conformance.engine import LayerSpec, RouterHandle, RouterSpec, Unsupported
from moe_conformance.engines import servers
from moe_conformance.engines.sglang import block, models, runtime
from moe_conformance.engines.sglang.refusing import refusals

# Families that are asked first, by model type: those that a method is known by.
_FIRST = ("mixtral", "olmoe", "gpt_oss", "glm4_moe", "hy_v3", "deepseek_v3", "deepseek_v2", "gemma4_text", "phimoe")


class Router(nn.Module):
    """A block whose experts note what they are handed, and compute nothing."""

    def __init__(self, found: block.Block) -> None:
        super().__init__()
        self.root, self.scale = found.root, found.scale

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """Copies share the configs of transformers, which nobody trains."""
        for module in self.modules():
            memo |= {id(value): value for value in vars(module).values() if isinstance(value, PretrainedConfig)}
        twin = self.__new__(Router)
        memo[id(self)] = twin
        twin.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return twin

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        experts = next(module for module in self.root.modules() if models.is_experts(module))
        if hidden.dtype == torch.float64:
            raise Unsupported(f"router_module: the gate of {type(self.root).__name__} computes in float32 at most")
        with runtime.building(hidden.dtype), block.stopping(experts) as heard, refusals():
            self.root(hidden, **block.step(inspect.signature(self.root.forward).parameters, None))
        if not heard:
            raise Unsupported(f"router_module: {type(self.root).__name__} hands no routing to its experts")
        return heard[0].topk_weights.float() * self.scale, heard[0].topk_ids


@torch.no_grad()
def router_module(spec: RouterSpec) -> tuple[RouterHandle, str]:
    """The router of the first model that has it, and the name of its block.

    Raises Unsupported with the reason of every such model, or where no family's record says this router.
    """
    reasons = []
    for setting, layer, config in servers.routers(spec, _small_models()):
        try:
            return _handle(spec, setting, layer, config)
        except Unsupported as refusal:
            reasons.append(f"{setting.record.slug}: {refusal}")
    raise Unsupported(
        "; ".join(reasons) or f"router_module: no model of SGLang's routes by {spec.logits}, {spec.routing}"
    )


def _small_models() -> list[str]:
    """Model types whose text model has a class of its own: what is around the others takes gigabytes."""
    first = dict.fromkeys(name for name in _FIRST if name in models.model_types())
    return [name for name in (first | dict.fromkeys(sorted(models.model_types()))) if models.is_text(name)]


def _handle(spec: RouterSpec, setting: Any, layer: LayerSpec, config: dict[str, Any]) -> tuple[RouterHandle, str]:
    tensors = servers.router_tensors(spec, layer, "sglang")
    found = block.loaded(config, setting.layer, spec.dtype, tensors)
    router = Router(found)
    held = {name: servers.holder(router, tensors[name]) for name in spec.tensors()}
    if held.get("router.proj") and router.get_parameter(held["router.proj"] or "").dtype != spec.dtype:
        raise Unsupported("it keeps its projection in float32, whatever the model's dtype is")
    if left := [name for name, holder in held.items() if holder is None]:
        raise Unsupported(f"it keeps {', '.join(left)} otherwise than as one whole tensor")
    _check_copies(router, found.name)
    return RouterHandle(router, "hidden", {name: holder or "" for name, holder in held.items()}), found.name


def _check_copies(router: Router, name: str) -> None:
    """Raise Unsupported where Python cannot copy the block."""
    try:
        copy.deepcopy(router)
    except Exception as error:
        raise Unsupported(f"router_module: {name} cannot be copied: {type(error).__name__}: {error}") from error
