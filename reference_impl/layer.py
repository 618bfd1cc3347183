"""One Mixture-of-Experts layer, in data order: route, the routed experts, the shared ones, a dense MLP, their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import LayerInputs, Routing
from moe_conformance.model.specs import DenseSpec, LayerSpec, SharedSpec
from moe_conformance.reference_impl.experts import mlp, rms_norm, routed_experts, wide
from moe_conformance.reference_impl.padding import pad, pad_expert_weights, unpad
from moe_conformance.reference_impl.quantised.experts import stored_experts
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import route_logits

Tensors = Mapping[str, Tensor]
Experts = Callable[..., Tensor]


class LayerOutput(NamedTuple):
    """output: [T, H] in x's dtype. ids, weights: [T, K], as the experts got them. state: for the next MoE layer."""

    output: Tensor
    ids: Tensor
    weights: Tensor
    state: Tensor | None


class Padding(NamedTuple):
    """The widths an engine's expert kernel runs at, at least D and F, and how it pads and unpads (padding.py)."""

    hidden: int
    intermediate: int
    pad: Callable[[Tensor, int], Tensor]
    unpad: Callable[[Tensor, int], Tensor]


def layer(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    *,
    token_ids: Tensor | None = None,
    state: Tensor | None = None,
    sequences: int = 1,
    routing: Routing | None = None,
    experts: Experts | None = None,
) -> LayerOutput:
    """What the layer computes of its input, without the residual around it.

    x: [T, H], as the router sees it. tensors: as `spec.tensors()` names and shapes them. token_ids: [T] integer, for a
    "table" selector. state: [T, R], the router state of the previous MoE layer, for a router that takes one.
    sequences: how many sequences of equal length x holds, one after the other. routing: ids and weights [T, K] instead
    of the router's, which still gives the state and the shared experts' weights; for dropped pairs see
    `routed_experts`.
    experts: what computes the routed sum instead of `routed_experts`, with its arguments; on several ranks, `on_ranks`.
    """
    logits, state = router_logits(x, spec.logits, tensors, state=state)  # [T, classes]
    ids, weights, shared = route_logits(logits, spec.routing, tensors, token_ids=token_ids, sequences=sequences)
    if routing is not None:
        ids, weights = routing
    output = experts_output(x, spec, tensors, ids, weights, shared, experts=experts)
    return LayerOutput(output, ids, weights, state)


def experts_output(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor,
    shared_weights: Tensor | None = None,
    padding: Padding | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """All that follows the router: [T, H] -> [T, H]. Sums of two parts in the parts' dtype.

    A model that adds its shared experts in float32 (LayerSpec.combine_dtype, hy_v3) gets the same bits: the sum of
    two stored numbers is rounded once either way.
    """
    output = _routed(x, spec, tensors, ids, weights, padding, experts)
    if spec.shared is not None:
        output = output + shared_output(x, spec.shared, tensors, shared_weights)
        if spec.shared.combine == "average":  # of the two sums, however many experts each has (cohere2_moe)
            output = output / 2
    if spec.dense is not None:
        output = output + dense_output(x, spec.dense, tensors)
    if spec.output_bias:
        output = output + tensors["output.bias"]
    if spec.output_norm:
        output = rms_norm(output, tensors["output.norm"], spec.output_norm)
    return output


def _routed(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor,
    padding: Padding | None,
    experts: Experts | None,
) -> Tensor:
    """The routed sum: norm, project in, pad, experts, cut, scale, project out, norm; each where the model has it.

    The padded columns are cut before anything else touches the sum, because the garbage in them would enter the
    projection, or the width would not match the shared output (vllm#40794). The scale multiplies only the routed sum.
    """
    latent, norm_eps = spec.latent, spec.dense.norm_eps if spec.dense else 0.0
    if norm_eps:
        x = rms_norm(x, tensors["experts.norm"], norm_eps)
    if latent is not None:
        x = F.linear(x, tensors["latent.in"], tensors.get("latent.in_bias"))  # [T, D]
        if latent.norm_eps:
            x = rms_norm(x, 1 + tensors["latent.norm"], latent.norm_eps)
    width, own = x.shape[1], tensors
    if padding is not None:
        own = pad_expert_weights(tensors, spec.experts, padding.hidden, padding.intermediate)
        x = padding.pad(x, padding.hidden)
    compute, identity = experts or routed_experts, spec.routing.identity_experts
    output = compute(x, spec.experts, own, ids, weights, identity_experts=identity)  # [T, padded D]
    if padding is not None:
        output = padding.unpad(output, width)
    output = output * spec.output_scale  # [T, D]
    if latent is not None:
        output = F.linear(output, tensors["latent.out"], tensors.get("latent.out_bias"))  # [T, H]
    return rms_norm(output, tensors["experts.sum_norm"], norm_eps) if norm_eps else output


def shared_output(x: Tensor, spec: SharedSpec, tensors: Tensors, weights: Tensor | None) -> Tensor:
    """The always-on experts as one MLP; weights [T, n]: what the router gives each, where it does (inkling)."""
    output = mlp(x, spec.mlp, tensors, "shared", weights)
    return output * F.linear(x, tensors["shared.gate"]).sigmoid() if spec.gate else output


def dense_output(x: Tensor, spec: DenseSpec, tensors: Tensors) -> Tensor:
    """The dense MLP beside the experts, between two norms where the model has them (gemma4)."""
    if not spec.norm_eps:
        return mlp(x, spec.mlp, tensors, "dense")
    output = mlp(rms_norm(x, tensors["dense.norm"], spec.norm_eps), spec.mlp, tensors, "dense")
    return rms_norm(output, tensors["dense.sum_norm"], spec.norm_eps)


def moe_layer(inputs: LayerInputs) -> Tensor:
    """The layer's output [T, H] in x's dtype; see LayerInputs for shapes."""
    spec, tensors = inputs.spec, inputs.tensors
    width = spec.latent.width if spec.latent else spec.hidden_size
    ids, weights, shared = route_logits(inputs.logits, spec.routing, tensors, token_ids=inputs.token_ids)
    experts: Experts = routed_experts
    if inputs.quant is not None:
        plain, around = stored_experts(inputs.quant, spec.experts, tensors, width, wide(inputs.x.dtype))
        tensors, experts = {**tensors, **plain}, partial(routed_experts, around=around)
    padding = None
    if inputs.padded_hidden or inputs.padded_intermediate:
        padding = Padding(inputs.padded_hidden or width, inputs.padded_intermediate or spec.experts.width, pad, unpad)
    return experts_output(inputs.x, spec, tensors, ids, weights, shared, padding, experts)
