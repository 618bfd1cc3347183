"""One Mixture-of-Experts layer in kernels: route, align, both projections, combine. Twin of reference_impl/layer.py.

Plain matrix products and norms over all tokens (router projection, latent projections, shared and dense MLP) are the
reference's torch code. The combine kernel scales the routed sum and adds what is always on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from moe_conformance.engine import LayerInputs, LayerSpec, Routing
from moe_conformance.errors import Unsupported
from moe_conformance.kernels.experts import routed_experts
from moe_conformance.kernels.float8 import quantised_of
from moe_conformance.kernels.routing import route_logits
from moe_conformance.reference_impl.layer import LayerOutput, Tensors, dense_output, experts_output, shared_output
from moe_conformance.reference_impl.padding import pad_expert_weights
from moe_conformance.reference_impl.router import router_logits


def layer(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    *,
    token_ids: Tensor | None = None,
    state: Tensor | None = None,
    sequences: int = 1,
    routing: Routing | None = None,
    **storage: Any,
) -> LayerOutput:
    """What the layer computes of its input, without the residual around it; arguments as the reference's `layer`.

    storage: layout of the experts' weights: `quantised` and `interleaved` of `routed_experts`.
    Raises Unsupported for routing that looks beyond one row of logits (capacity, product keys).
    """
    logits, state = router_logits(x, spec.logits, tensors, state=state)  # [T, classes]
    if routing is not None and not spec.routing.shared_classes:
        ids, weights = routing
        return LayerOutput(combined(x, spec, tensors, ids, weights, **storage), ids, weights, state)
    ids, weights, shared = route_logits(logits, spec.routing, tensors, token_ids=token_ids, sequences=sequences)
    if routing is not None:
        ids, weights = routing
    return LayerOutput(combined(x, spec, tensors, ids, weights, shared, **storage), ids, weights, state)


def combined(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    **storage: Any,
) -> Tensor:
    """All that follows the router, [T, H] -> [T, H]; fused into the combine launch if no step comes between."""
    between = spec.latent or (spec.dense and spec.dense.norm_eps) or spec.output_bias or spec.output_norm
    if between or (spec.shared and spec.shared.combine != "sum"):
        return experts_output(x, spec, tensors, ids, weights, shared, experts=partial(routed_experts, **storage))
    added = None
    if spec.shared:
        added = shared_output(x, spec.shared, tensors, shared)
    if spec.dense:
        dense = dense_output(x, spec.dense, tensors)
        added = dense if added is None else added + dense
    return routed_experts(
        x,
        spec.experts,
        tensors,
        ids,
        weights,
        identity_experts=spec.routing.identity_experts,
        output_scale=spec.output_scale,
        added=added,
        **storage,
    )


def moe_layer(inputs: LayerInputs) -> Tensor:
    """The layer's output [T, H] in x's dtype; see LayerInputs for shapes.

    Weights are padded as a load would leave them; x and output are not, for the kernels' masks cut them.
    Raises Unsupported for routing that looks beyond one row of logits, for stored forms that the kernels do not read,
    and for stored forms at padded widths.
    """
    spec, tensors, storage = inputs.spec, inputs.tensors, {}
    ids, weights, shared = route_logits(inputs.logits, spec.routing, tensors, token_ids=inputs.token_ids)
    padded = inputs.padded_hidden or inputs.padded_intermediate
    if inputs.quant is not None:
        if padded:
            raise Unsupported("layer: got quant and padded widths, want one of both: codes are not padded here")
        storage["quantised"] = quantised_of(inputs.quant, spec.experts, tensors)
    elif padded:
        width = spec.latent.width if spec.latent else spec.hidden_size
        sizes = inputs.padded_hidden or width, inputs.padded_intermediate or spec.experts.width
        tensors = {**tensors, **pad_expert_weights(tensors, spec.experts, *sizes)}
    return combined(inputs.x, spec, tensors, ids, weights, shared, **storage)
