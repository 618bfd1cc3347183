"""One Mixture-of-Experts layer, in data order: route, project in, pad, experts, unpad, scale, project out, add."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import LayerInputs, RouteInputs
from moe_conformance.reference_impl.experts import gated_mlp, routed_experts
from moe_conformance.reference_impl.padding import pad, pad_expert_weights, unpad
from moe_conformance.reference_impl.routing import route


def moe_layer(inputs: LayerInputs) -> Tensor:
    """The layer's output [T, H] in x's dtype; see LayerInputs for shapes.

    Order matters twice. The padded columns are cut before anything else touches the routed sum, because whatever
    the kernel left there would enter the projection or not fit the shared output (vllm#40794). The scale meets the
    routed sum only, never the shared expert.
    """
    ids, weights = route(RouteInputs(inputs.logits, inputs.top_k, inputs.method, inputs.per_expert_scale))

    x = inputs.x if inputs.latent_in is None else F.linear(inputs.x, inputs.latent_in)  # [T, D]
    width, intermediate = x.shape[-1], inputs.w2.shape[-1]
    hidden = inputs.padded_hidden or width
    w13, w2 = pad_expert_weights(inputs.w13, inputs.w2, hidden, inputs.padded_intermediate or intermediate)

    routed = routed_experts(pad(x, hidden), w13, w2, ids, weights, inputs.activation)  # [T, padded D]
    routed = unpad(routed, width) * inputs.scale  # [T, D]

    if inputs.latent_out is not None:
        routed = F.linear(routed, inputs.latent_out)  # [T, H]
    if inputs.shared_w13 is None or inputs.shared_w2 is None:
        return routed
    return routed + gated_mlp(inputs.x, inputs.shared_w13, inputs.shared_w2, "silu")
