"""One MoE layer: the real block of a family, with the case's tensors in it and the case's logits at its router."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import LayerInputs, LayerSpec
from moe_conformance.engines.transformers.block import Block, choose
from moe_conformance.engines.transformers.filling import fill
from moe_conformance.engines.transformers.matching import for_layer, shared_class
from moe_conformance.engines.transformers.routing import GivenLogits, name_of
from moe_conformance.errors import Unsupported

# Activations as configs write them.
WORDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def layer(inputs: LayerInputs, implementation: str) -> Tensor:
    """The block's output [T, H]. A model that always has a shared expert gets a zero one if the spec has none."""
    if inputs.quant is not None or inputs.padded_hidden is not None or inputs.padded_intermediate is not None:
        raise Unsupported("layer: transformers' blocks take neither quantised weights nor padded widths")
    found = for_layer(inputs.spec, name_of(inputs.x.dtype))
    block = copy.deepcopy(found.block())
    if found.own_shared:
        _build_shared(block, found.spec)
    if found.spec.dense and not inputs.spec.dense:
        block.root = Bare(block.moe)
    fill(block, inputs.tensors, inputs.x.dtype, inputs.x.device)
    choose(block.moe, None, implementation)
    token_ids = None if inputs.token_ids is None else inputs.token_ids.unsqueeze(0)
    with torch.no_grad(), GivenLogits(block.moe, inputs.logits):
        output: Tensor = block(inputs.x.unsqueeze(0), token_ids, None)
    return output.squeeze(0)


class Bare(nn.Module):
    """Gemma 4's router and experts, without the norms and the dense MLP around them in its decoder layer."""

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
    built = shared_class(block.moe)
    assert spec.shared is not None and built is not None
    name, mlp = built
    config = copy.copy(block.config)
    config.hidden_act = WORDS[spec.shared.mlp.activation]
    with torch.device("meta"):
        setattr(block.moe, name, mlp(config, intermediate_size=spec.shared.mlp.width).eval())
