"""vLLM's whole expert layer: its runner around one of its expert kernels, with the router that it makes for a CPU.

Handed in, as its models hand them in: the routing function of Gemma 4 or Llama 4, a shared expert, latent projections.
Each is a module of one of vLLM's models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import LayerInputs, MLPSpec, SharedSpec
from moe_conformance.engines.vllm import built, gemma4, routing, runtime
from moe_conformance.engines.vllm.refusing import all_of
from moe_conformance.errors import Unsupported


def features() -> frozenset[str]:
    """Those that the builder has an argument for."""
    wanted = inspect.signature(built.factory()).parameters
    found = {"softmax", "sigmoid", "renormalize", "not_renormalized", "per_expert_scale", "score_of_chosen"}
    found |= {"input_precision", "selection_bias", "groups", "group_top2", "group_mask", "routed_scale"}
    found |= {"gelu", "gelu_tanh", "relu2", "not_gated", "bias", "clamp", "swiglu_oai", "weight_on_input"}
    found |= {"padded_hidden", "padded_intermediate", "same_bits"}
    if "shared_experts" in wanted:
        found |= {"shared", "shared_gate"}
    if {"routed_input_transform", "routed_output_transform"} <= wanted.keys():
        found |= {"latent", "latent_bias"}
    if "apply_routed_scale_to_output" in wanted:
        found.add("output_scale")
    return frozenset(found)


def layer(inputs: LayerInputs, kernels: Sequence[built.Kernel]) -> tuple[Tensor, str]:
    """Build the layer for these inputs with the first kernel that takes it, and run it once: output, kernel."""
    runtime.start()
    refused = []
    for kernel in kernels:
        if kernel == "fused_experts":
            continue
        try:
            return _layer(inputs, kernel)
        except Unsupported as refusal:
            refused.append(refusal)
    raise all_of(refused)


def _layer(inputs: LayerInputs, kernel: built.Kernel) -> tuple[Tensor, str]:
    spec = inputs.spec
    with runtime.building(built.vllm_config(inputs.x.dtype), inputs.x.dtype):
        arguments = _routing(inputs, kernel)
        if spec.shared is not None:
            arguments["shared_experts"] = _shared(spec.shared, spec.hidden_size, inputs)
        if spec.latent is not None:
            arguments["routed_input_transform"] = _projection("latent.in", inputs)
            arguments["routed_output_transform"] = _projection("latent.out", inputs)
    if spec.output_scale != 1:
        arguments |= {"routed_scaling_factor": spec.output_scale, "apply_routed_scale_to_output": True}
    experts = {name: tensor for name, tensor in inputs.tensors.items() if name.startswith("experts.")}
    made = built.Layer(
        spec.experts, spec.latent.width if spec.latent else spec.hidden_size, spec.routing.top_k, inputs.x.dtype,
        experts, arguments, inputs.padded_hidden, inputs.padded_intermediate,
    )  # fmt: skip
    logits = routing.as_projected(spec.routing, inputs.logits)
    layer = built.Built(made, kernel)
    return layer.run(inputs.x, logits, inputs.token_ids), layer.name


def _routing(inputs: LayerInputs, kernel: built.Kernel) -> dict[str, Any]:
    spec = inputs.spec.routing
    if gemma4.is_gemma4(spec):
        scale = inputs.tensors["router.per_expert_scale"]
        return {"custom_routing_function": gemma4.routing_function(spec, scale.float()), "renormalize": True}
    asked = routing.arguments(spec, inputs.tensors, inputs.logits.shape[-1])
    if kernel == "triton" and (select := routing.select_experts()) is not None:
        # A release whose kernel for a CPU routes by itself has no such router: what that kernel calls is handed in.
        return {"custom_routing_function": routing.as_function(select, asked)}
    return asked


def _shared(spec: SharedSpec, hidden: int, inputs: LayerInputs) -> nn.Module:
    """The MLP of Qwen2-MoE, with its gate or without, or that of Nemotron-H, which has no gate projection."""
    mlp, tensors = spec.mlp, inputs.tensors
    gated, plain = MLPSpec(mlp.width), MLPSpec(mlp.width, "relu2", gated=False)
    if spec.weighted or spec.combine != "sum" or mlp not in (gated, plain) or (spec.gate and mlp == plain):
        raise Unsupported(f"layer: no model of vLLM's hands such a shared expert to its layer: {spec}")
    from vllm.model_executor.models.nemotron_h import NemotronHMLP
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

    if mlp == plain:
        module = NemotronHMLP(None, hidden, mlp.width, reduce_results=False, prefix="shared")
        return _filled(module, {"up_proj.weight": tensors["shared.w1"], "down_proj.weight": tensors["shared.w2"]})
    gate = _linear(tensors["shared.gate"]) if spec.gate else None
    asked: dict[str, Any] = {"hidden_act": "silu", "reduce_results": False, "expert_gate": gate, "prefix": "shared"}
    module = Qwen2MoeMLP(hidden, mlp.width, **asked)
    return _filled(module, {"gate_up_proj.weight": tensors["shared.w13"], "down_proj.weight": tensors["shared.w2"]})


def _projection(name: str, inputs: LayerInputs) -> nn.Module:
    if inputs.spec.latent is not None and inputs.spec.latent.norm_eps:
        raise Unsupported("layer: no model of vLLM's normalises what enters its latent experts")
    return _linear(inputs.tensors[name], inputs.tensors.get(f"{name}_bias"))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """vLLM's own linear module with these values."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    module = ReplicatedLinear(weight.shape[1], weight.shape[0], bias=bias is not None, params_dtype=weight.dtype)
    return _filled(module, {"weight": weight} | ({} if bias is None else {"bias": bias}))


@torch.no_grad()
def _filled(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """The module with these values, and each of its linear parts made ready, as after loading a checkpoint."""
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
    for part in module.modules():
        method = getattr(part, "quant_method", None)
        # A part that was handed in is ready already.
        if method is not None and any(p is parameters.get(name) for name in values for p in part.parameters(False)):
            method.process_weights_after_loading(part)
    return module
