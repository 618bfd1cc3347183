"""Where vLLM puts each expert under expert parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import ExpertMapSpec

PLACEMENTS = {"contiguous": "linear", "round_robin": "round_robin"}


def determine() -> Callable[..., Any]:
    """vLLM's determine_expert_map, newest place first. Raises ImportError where there is none."""
    for place in ("expert_map_manager", "layer"):
        with contextlib.suppress(ImportError, AttributeError):
            module = import_module(f"vllm.model_executor.layers.fused_moe.{place}")
            function: Callable[..., Any] = module.determine_expert_map
            return function
    raise ImportError("no determine_expert_map")


def expert_map(spec: ExpertMapSpec) -> Tensor:
    """[E] int32. One rank has no map in vLLM: local ids are global ids."""
    placement = PLACEMENTS[spec.placement]
    count, found, *_ = determine()(spec.ranks, spec.rank, spec.experts, placement)
    if found is None:
        return torch.arange(count, dtype=torch.int32)
    mapped: Tensor = found
    return mapped
