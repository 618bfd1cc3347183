"""How a script calls transformers as this adapter does: the experts module of a family, by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_conformance.engine import ExpertsInputs, Repro, Routing, Unsupported
from moe_conformance.engines.transformers.block_routing import FORMS, allow_no_expert, in_own_words
from moe_conformance.engines.transformers.experts import block_with

_SOURCE = """\
from {module} import {experts}
from transformers import {config}

config = {config}.from_dict({values})
config._experts_implementation = {implementation!r}
with torch.device("meta"):
    experts = {experts}(config).eval()
experts.load_state_dict({{name: t[name] for name in experts.state_dict()}}, assign=True)
experts._is_expert_parallel = {parallel}  # ids of {count} are pairs that no expert takes
with torch.no_grad():
    got = experts(t["x"], t["ids"], t["weights"])
"""


def repro(inputs: Any, implementation: str) -> Repro:
    """Of experts that are a module which takes ids and weights. Raises Unsupported for anything else."""
    if not isinstance(inputs, ExpertsInputs):
        raise Unsupported("repro: this stage is shown through the adapter")
    block = block_with(inputs, implementation)
    moe = block.moe
    if type(getattr(moe, "router", None)).__name__ in FORMS:
        raise Unsupported("repro: these experts are called by their block")
    routing = Routing(inputs.ids, inputs.weights)
    ids, weights = routing if inputs.native_ids else in_own_words(moe, routing)
    allow_no_expert(moe.experts, ids)
    experts, config = type(moe.experts), getattr(moe.experts, "config", block.config)
    if not _is_made_of_its_config(moe.experts, config):
        raise Unsupported(f"repro: {experts.__name__} is not made of its config alone")
    values = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    source = _SOURCE.format(
        module=experts.__module__,
        experts=experts.__name__,
        config=type(config).__name__,
        values=values,
        implementation=implementation,
        parallel=moe.experts._is_expert_parallel,
        count=inputs.experts,
    )
    return Repro(source, {**moe.experts.state_dict(), "x": inputs.x, "ids": ids, "weights": weights})


def _is_made_of_its_config(experts: nn.Module, config: Any) -> bool:
    """Whether a new one of the config, read from its values, has the same parameters."""
    try:
        with torch.device("meta"):
            made = type(experts)(type(config).from_dict(config.to_diff_dict()))
    except (TypeError, AttributeError):
        return False

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in module.state_dict().items()}

    return shapes(made) == shapes(experts)
