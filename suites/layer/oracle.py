"""The layer in float64 without any padding, and how far a correct engine may be from it; nothing of reference_impl."""

from __future__ import annotations

from torch import Tensor

from moe_conformance.engine import LayerInputs
from moe_conformance.model.specs import LatentSpec, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, SharedSpec
from moe_conformance.oracle.layer import layer_value
from moe_conformance.oracle.routing import weights_value
from moe_conformance.oracle.tolerance import Bound, Contract


def layer(inputs: LayerInputs) -> tuple[Tensor, Bound]:
    """The exact output [T, H] in float64, and the largest error of a correct engine that stores in x's dtype."""
    spec, dtype = _spec(inputs), inputs.x.dtype
    named = {
        "experts.w13": inputs.w13,
        "experts.w2": inputs.w2,
        "shared.w13": inputs.shared_w13,
        "shared.w2": inputs.shared_w2,
        "latent.in": inputs.latent_in,
        "latent.out": inputs.latent_out,
        "router.per_expert_scale": inputs.per_expert_scale,
    }
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    ids = inputs.logits.double().topk(inputs.top_k).indices
    weights, _ = weights_value(inputs.logits, ids, spec.routing, tensors, dtype)
    value = layer_value(inputs.x, spec, tensors, ids, weights, Contract.stored(dtype))
    return value.exact, value.bound(f"float32 sums and {dtype} stores, carried through the layer")


def _spec(inputs: LayerInputs) -> LayerSpec:
    hidden, latent, shared = inputs.x.shape[1], inputs.latent_in, inputs.shared_w2
    return LayerSpec(
        hidden,
        len(inputs.w13),
        LogitsSpec(),
        RoutingSpec(
            inputs.top_k,
            renormalize="no" if inputs.method == "softmax_topk" else "sum",
            per_expert_scale=inputs.per_expert_scale is not None,
        ),
        MLPSpec(inputs.w2.shape[-1], inputs.activation),
        shared=None if shared is None else SharedSpec(MLPSpec(shared.shape[-1])),
        latent=None if latent is None else LatentSpec(len(latent)),
        output_scale=inputs.scale,
    )
