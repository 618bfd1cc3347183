"""The routed sum at a given routing: the real experts module of a family."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Routing
from moe_conformance.engines.transformers import stored
from moe_conformance.engines.transformers.block import Block, choose
from moe_conformance.engines.transformers.block_routing import FORMS, Tap, allow_no_expert, in_own_words
from moe_conformance.engines.transformers.filling import fill
from moe_conformance.engines.transformers.matching import for_experts
from moe_conformance.engines.transformers.routing import name_of
from moe_conformance.errors import Unsupported


def experts(inputs: ExpertsInputs, implementation: str) -> Tensor:
    """Ids and weights as given; "no expert" is the id E with weight 0."""
    asked = {
        "an expert map": inputs.expert_map is not None,
        "a scale of the sum": inputs.output_scale != 1,
        "LoRA": inputs.lora is not None,
    }
    if refused := [name for name, is_asked in asked.items() if is_asked]:
        raise Unsupported(f"experts: no experts module of transformers takes {' or '.join(refused)}")
    block = block_with(inputs, implementation)
    routing = Routing(inputs.ids, inputs.weights)
    with torch.no_grad():
        if type(getattr(block.moe, "router", None)).__name__ in FORMS:
            # For experts that take no ids, the block around them runs, with a zero shared expert. They take a score for
            # every expert and token (Llama 4), and cannot express a pair without an expert.
            if not inputs.native_ids and bool((inputs.ids < 0).any()):
                raise Unsupported(f"experts: {type(block.moe).__name__} computes every expert, and drops no pair")
            with Tap(block.moe, routing, inputs.native_ids):
                output: Tensor = block(inputs.x.unsqueeze(0), None, None).squeeze(0)
        else:
            ids, weights = routing if inputs.native_ids else in_own_words(block.moe, routing)
            allow_no_expert(block.moe.experts, ids)
            output = block.moe.experts(inputs.x, ids, weights)
    return output


def block_with(inputs: ExpertsInputs, implementation: str) -> Block:
    """A block of a family with these experts in it."""
    width, top_k = inputs.x.shape[-1], inputs.ids.shape[-1]
    dtype = name_of(inputs.x.dtype)
    block = for_experts(inputs.mlp, inputs.experts, inputs.identity_experts, top_k, width, dtype).block()
    tensors = inputs.tensors if inputs.quant is None else stored.dequantised(inputs, inputs.quant)
    fill(block, tensors, inputs.x.dtype, inputs.x.device)
    choose(block.moe, None, implementation)
    return block
