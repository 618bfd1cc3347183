"""One MoE layer: the real block of a family, with the case's weights in it and the case's logits at its router.

What stands behind which feature:

softmax_topk                            DeepseekV2Moe: shared expert added plainly, routed_scaling_factor
softmax_topk_renorm                     MixtralSparseMoeBlock
softmax_topk_renorm, shared or scale    MistralLarge4TextMoE
gemma4                                  Gemma4TextRouter and Gemma4TextExperts, called as its decoder layer calls them
gelu_tanh                               hidden_act="gelu_pytorch_tanh" for the routed experts, in any of these
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import LayerInputs
from moe_conformance.engines.transformers.families import DEEPSEEK_V2, GEMMA4, MISTRAL_LARGE4, MIXTRAL, Family
from moe_conformance.engines.transformers.routing import GivenLogits
from moe_conformance.errors import Unsupported

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def features() -> frozenset[str]:
    found = {"gelu_tanh"}
    if DEEPSEEK_V2.has_layer():
        found |= {"softmax_topk"}
    if MIXTRAL.has_layer():
        found |= {"softmax_topk_renorm"}
    if GEMMA4.has_layer():
        found |= {"gemma4"}
    if DEEPSEEK_V2.has_layer() and MISTRAL_LARGE4.has_layer():
        found |= {"shared", "scale"}
    return frozenset(found)


def layer(inputs: LayerInputs, experts_implementation: str) -> Tensor:
    """The block's output [T, H]. Raises Unsupported for gemma4 with a scale or a shared expert, which it has not."""
    plain = inputs.shared_w13 is None and inputs.scale == 1.0
    if inputs.method == "gemma4":
        if not plain:
            raise Unsupported("layer: Gemma 4 has neither a routed scaling factor nor a shared expert")
        family = GEMMA4
    elif inputs.method == "softmax_topk":
        family = DEEPSEEK_V2
    else:
        family = MIXTRAL if plain else MISTRAL_LARGE4
    block = _block(family, inputs, experts_implementation)
    with torch.no_grad():
        out: Tensor = block(inputs.x.unsqueeze(0)).squeeze(0)
    return out


def _block(family: Family, inputs: LayerInputs, experts_implementation: str) -> Any:
    experts, _, hidden = inputs.w13.shape
    others = {family.intermediate: inputs.w2.shape[-1], family.activation: ACTIVATIONS[inputs.activation]}
    if family in (DEEPSEEK_V2, MISTRAL_LARGE4):
        others |= {"routed_scaling_factor": inputs.scale, "n_shared_experts": 1}
    config = family.make_config(experts, inputs.top_k, hidden, **others)
    config._experts_implementation = experts_implementation
    with torch.device("meta"):
        block = family.get(family.block)(config) if family.block else Gemma4Experts(config)
    block.experts.gate_up_proj = _parameter(inputs.w13)
    block.experts.down_proj = _parameter(inputs.w2)
    if hasattr(block, "shared_experts"):
        config.hidden_act = "silu"  # from here on read by the shared expert only
        block.shared_experts = _shared(type(block.shared_experts), config, inputs)
    router = block.gate.to_empty(device=inputs.x.device).to(inputs.x.dtype)
    if inputs.per_expert_scale is not None:
        router.per_expert_scale = _parameter(inputs.per_expert_scale)
    block.gate = GivenLogits(router, inputs.logits)
    return block.eval()


class Gemma4Experts(nn.Module):
    """Gemma 4's router and experts without the norms and the dense MLP that its decoder layer has around them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = GEMMA4.get(GEMMA4.router)(config)
        self.experts = GEMMA4.get(GEMMA4.experts)(config)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, ids = self.gate(flat)
        out: Tensor = self.experts(flat, ids, weights).view_as(x)
        return out


def _shared(mlp: Any, config: Any, inputs: LayerInputs) -> Any:
    """The block's shared expert; a layer without one gets one column of zeros."""
    gate_up, down = inputs.shared_w13, inputs.shared_w2
    if gate_up is None or down is None:
        gate_up, down = inputs.x.new_zeros(2, inputs.x.shape[-1]), inputs.x.new_zeros(inputs.x.shape[-1], 1)
    with torch.device("meta"):
        shared = mlp(config, intermediate_size=down.shape[-1])
    gate, up = gate_up.chunk(2)
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        getattr(shared, name).weight = _parameter(weight)
    return shared


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
