"""One MoE layer: the real block of a family, with the case's tensors in it and the case's logits at its router."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import LayerInputs, LayerSpec
from moe_conformance.engines.transformers.block import Block, block_of, choose
from moe_conformance.engines.transformers.filling import fill
from moe_conformance.engines.transformers.matching import ACTIVATIONS, config_of, for_layer
from moe_conformance.engines.transformers.routing import GivenLogits, name_of
from moe_conformance.errors import Unsupported


def layer(inputs: LayerInputs, implementation: str) -> Tensor:
    """The block's output [T, H]. A model that always has a shared expert gets one of zeros where the spec has none."""
    if inputs.quant is not None or inputs.padded_hidden is not None or inputs.padded_intermediate is not None:
        raise Unsupported("layer: transformers' blocks take neither quantised weights nor padded widths")
    family, spec = for_layer(inputs.spec, name_of(inputs.x.dtype))
    block = copy.deepcopy(block_of(json.dumps(config_of(family, spec)), 0))
    if family.keys.get("shared.mlp.width") == "":
        _build_shared(block, spec)
    if family.bare:
        block.root = Bare(block.moe)
    fill(block, inputs.tensors, rest=inputs.x.dtype)
    choose(block.moe, None, implementation)
    token_ids = None if inputs.token_ids is None else inputs.token_ids.unsqueeze(0)
    with torch.no_grad(), GivenLogits(block.moe, inputs.logits):
        output: Tensor = block(inputs.x.unsqueeze(0), token_ids, None)
    return output.squeeze(0)


class Bare(nn.Module):
    """Gemma 4's router and experts without the norms and the dense MLP that its decoder layer has around them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, ids = self.router(flat)
        output: Tensor = self.experts(flat, ids, weights)
        return output.view_as(x)


def _build_shared(block: Block, spec: LayerSpec) -> None:
    """Give the block a shared expert of its family's class in the spec's width, with the spec's activation."""
    name = next(name for name in ("shared_experts", "shared_expert") if hasattr(block.moe, name))
    assert spec.shared is not None
    mlp = type(getattr(block.moe, name))
    config = copy.copy(block.config)
    config.hidden_act = ACTIVATIONS[spec.shared.mlp.activation]
    with torch.device("meta"):
        setattr(block.moe, name, mlp(config, intermediate_size=spec.shared.mlp.width).eval())
