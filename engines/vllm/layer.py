"""vLLM's whole expert layer around an expert kernel in plain torch that leaves NaN in its padded columns.

Real: padding of the input, routing call, shared experts, latent projections, cutting, scaling, adding.
Handed in, as models hand them in: the routing function, the shared expert and the latent projections.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import (
    LayerInputs,
    MLPSpec,
    RoutingSpec,
    SharedSpec,
    Unsupported,
    called_by_engine,
    poison_,
)
from moe_conformance.engines.vllm import runtime

_PREFIXES = (f"model.layers.0.experts_{i}" for i in itertools.count())


def layer_class() -> Any:
    """What builds the layer, newest name first: FusedMoEFactory, SharedFusedMoE, FusedMoE."""
    from vllm.model_executor.layers import fused_moe

    names = ("FusedMoEFactory", "SharedFusedMoE", "FusedMoE")
    return next(found for name in names if (found := getattr(fused_moe, name, None)) is not None)


def features() -> frozenset[str]:
    """Those that the builder has an argument for."""
    wanted = inspect.signature(layer_class()).parameters
    found = {
        "softmax",
        "renormalize",
        "not_renormalized",
        "per_expert_scale",
        "gelu_tanh",
        "padded_hidden",
        "same_bits",
    }
    if "shared_experts" in wanted:
        found.add("shared")
    if {"routed_input_transform", "routed_output_transform"} <= wanted.keys():
        found.add("latent")
    if "apply_routed_scale_to_output" in wanted:
        found.add("output_scale")
    return frozenset(found)


class SharedExpert(nn.Module):
    """down(silu(gate x) * up x), the weights as they come."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13, self.w2 = w13, w2

    @called_by_engine
    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.w13).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.w2)


class Projection(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    @called_by_engine
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def layer(inputs: LayerInputs) -> Tensor:
    """Build the layer for these inputs and run it once."""
    from vllm.forward_context import create_forward_context, override_forward_context

    _refuse(inputs)
    dtype = inputs.x.dtype
    with runtime.building(config := _vllm_config(dtype), dtype):
        built = _build(inputs)
        runner = getattr(built, "runner", built)
        if inputs.padded_hidden is not None:
            runner.moe_config.hidden_dim = inputs.padded_hidden
        _replace_kernel(built, inputs)
        with override_forward_context(create_forward_context(None, config)):
            # A real step's activations are the layer's to overwrite; a caller's are not.
            out = built(hidden_states=inputs.x.clone(), router_logits=inputs.logits.clone())
    return (
        out[0] + out[1] if isinstance(out, tuple) and out[0] is not None else out[1] if isinstance(out, tuple) else out
    )


def _refuse(inputs: LayerInputs) -> None:
    """What is handed in here computes softmax routing and gated experts, and a shared expert with silu."""
    spec = inputs.spec
    routing = RoutingSpec(
        spec.routing.top_k,
        renormalize="sum" if spec.routing.renormalize == "sum" else "no",
        per_expert_scale=spec.routing.per_expert_scale,
    )
    experts = MLPSpec(spec.experts.width, activation=spec.experts.activation)
    shared = spec.shared and SharedSpec(MLPSpec(spec.shared.mlp.width), spec.shared.count)
    for name, want in (("routing", routing), ("experts", experts), ("shared", shared)):
        if getattr(spec, name) != want:
            raise Unsupported(f"layer: {name}: got {getattr(spec, name)}, want {want}; that is what is handed in here")


@functools.cache
def _cached_config(dtype: str) -> Any:
    with runtime.gemma4_config({}, dtype) as config:
        return config


def _vllm_config(dtype: torch.dtype) -> Any:
    """One config a dtype; the layers of earlier calls are forgotten, so that their memory goes too."""
    config = _cached_config(str(dtype).removeprefix("torch."))
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()
    return config


def _build(inputs: LayerInputs) -> Any:
    spec, tensors = inputs.spec, inputs.tensors
    offered: dict[str, Any] = {
        "num_experts": spec.num_experts,
        "top_k": spec.routing.top_k,
        "hidden_size": spec.latent.width if spec.latent else spec.hidden_size,
        "intermediate_size": spec.experts.width,
        "params_dtype": inputs.x.dtype,
        "renormalize": spec.routing.renormalize == "sum",
        "prefix": next(_PREFIXES),
        "activation": _activation(spec.experts.activation),
        "custom_routing_function": _routing_function(inputs),
    }
    if spec.shared is not None:
        offered["shared_experts"] = SharedExpert(tensors["shared.w13"], tensors["shared.w2"])
    if spec.latent is not None:
        offered["routed_input_transform"] = Projection(tensors["latent.in"])
        offered["routed_output_transform"] = Projection(tensors["latent.out"])
    if spec.output_scale != 1:
        offered |= {"routed_scaling_factor": spec.output_scale, "apply_routed_scale_to_output": True}
    return layer_class()(**offered)


def _activation(name: str) -> str:
    """The release's word for it. The first ones know only "gelu", which is what their Gemma 4 asks for."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return name if name in {item.value for item in MoEActivation} else name.removesuffix("_tanh")


def _routing_function(inputs: LayerInputs) -> Any:
    scale = inputs.tensors.get("router.per_expert_scale")

    @called_by_engine
    def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """returns weights [T, K] float32, ids [T, K] int32."""
        weights, ids = gating_output.float().softmax(-1).topk(topk, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if scale is not None:
            weights = weights * scale[ids]
        return weights, ids.int()

    return route


def _replace_kernel(built: Any, inputs: LayerInputs) -> None:
    """Give the layer's quantisation method, wherever references to it are kept, another `apply`."""
    runner = getattr(built, "runner", built)
    method = next(
        found
        for owner, name in ((runner, "_quant_method"), (runner, "quant_method"), (built, "quant_method"))
        if (found := getattr(owner, name, None)) is not None
    )

    class InPlainTorch(type(method)):  # type: ignore[misc]
        is_monolithic = False

        @called_by_engine
        def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return _experts(inputs, x, topk_weights, topk_ids)

    method.__class__ = InPlainTorch


def _experts(inputs: LayerInputs, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """x: [T, P], at the padded width. returns [T, P] with NaN in the columns that are padding.

    The padded columns of the weights are zero, so that a padded column of x matters only if it is not finite.
    """
    w13, w2 = inputs.tensors["experts.w13"], inputs.tensors["experts.w2"]
    width, padded = w13.shape[-1], x.shape[-1]
    gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")
    act = nn.functional.silu if inputs.spec.experts.activation == "silu" else gelu_tanh
    total = x.new_zeros(x.shape[0], width)
    for expert in range(len(w13)):
        first = nn.functional.pad(w13[expert], (0, padded - width))  # [2F, P]
        gate, up = nn.functional.linear(x, first).chunk(2, dim=-1)  # [T, F]
        weight = weights.masked_fill(ids != expert, 0).sum(-1, keepdim=True)  # [T, 1]
        total += weight.to(x.dtype) * nn.functional.linear(act(gate) * up, w2[expert])
    out = poison_(x.new_empty(x.shape))
    out[:, :width] = total
    return out
