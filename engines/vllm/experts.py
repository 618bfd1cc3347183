"""vLLM's fused experts at a given routing: its expert layer, whose router hands the routing on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_conformance.engine import ExpertsInputs, called_by_engine
from moe_conformance.engines.vllm import built, device, interpreted, lora, routing, runtime, stored
from moe_conformance.engines.vllm.refusing import all_of, refusals
from moe_conformance.errors import Unsupported

# Columns that the kernel of identity experts writes at a time; it leaves out what does not fill so many.
_IDENTITY_BLOCK = 256


def features() -> frozenset[str]:
    """Every function and form of call that one of vLLM's models or routers makes; kernels refuse what they lack."""
    found = {"gelu", "gelu_tanh", "relu2", "not_gated", "bias", "clamp", "swiglu_oai", "weight_on_input"}
    found |= {"output_scale", "identity_experts", "dropped_ids", "expert_map", "same_bits"}
    return frozenset(found | stored.formats() | {"lora"})


def experts(inputs: ExpertsInputs, kernels: Sequence[built.Kernel]) -> tuple[Tensor, str]:
    """The routed sum [T, D], and what computed it: the first of these kernels that takes the call.

    Raises Unsupported with the reason of each.
    """
    if inputs.quant is not None:  # layers read their codes from checkpoints
        kernels = [kernel for kernel in kernels if kernel == "fused_experts"]
        if not kernels:
            raise Unsupported("vLLM: stored weights are given to its functional entry alone")
    if inputs.lora is not None:
        if inputs.quant is not None:
            raise Unsupported("vLLM: stored weights go to its functional entry, which takes no adapters")
        if "triton" not in kernels:
            raise Unsupported("vLLM: adapters are added by its Triton experts alone")
        return _by_layer(inputs, "triton")
    refused = []
    for kernel in kernels:
        try:
            return _by_function(inputs) if kernel == "fused_experts" else _by_layer(inputs, kernel)
        except Unsupported as refusal:
            refused.append(refusal)
    raise all_of(refused)


def _by_layer(inputs: ExpertsInputs, kernel: built.Kernel) -> tuple[Tensor, str]:
    width = inputs.x.shape[-1]
    if inputs.identity_experts:
        if inputs.expert_map is not None:
            raise Unsupported(
                "vLLM: what identity experts pass on is added to the sum over ranks, and to no rank's part"
            )
        if kernel == "native" and routing.select_experts() is not None:
            raise Unsupported("vLLM: this release's kernel for a CPU routes by itself, and has no identity experts")
        inputs = _widened(inputs, _IDENTITY_BLOCK)
    ids, weights, expert_map = _said(inputs, kernel)

    @called_by_engine
    def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return weights.clone(), ids.clone()

    arguments: dict[str, Any] = {"custom_routing_function": route}
    if inputs.identity_experts:
        bias = torch.zeros(inputs.experts + inputs.identity_experts, device=inputs.x.device)
        arguments = {"zero_expert_type": "identity", "e_score_correction_bias": nn.Parameter(bias, requires_grad=False)}
    if inputs.output_scale != 1:
        # The router of identity experts scales its weights, for what it passes on is added behind the scaled sum.
        arguments |= {"routed_scaling_factor": inputs.output_scale}
        arguments |= {} if inputs.identity_experts else {"apply_routed_scale_to_output": True}
    layer = built.Layer(
        inputs.mlp, inputs.x.shape[-1], ids.shape[-1], inputs.x.dtype, inputs.tensors, arguments, expert_map=expert_map,
        tokens=max(runtime.MAX_TOKENS, len(inputs.x)),
    )  # fmt: skip
    logits = inputs.x.new_zeros(len(inputs.x), inputs.experts + inputs.identity_experts)
    with _routing_of_zero_experts(weights, ids) if inputs.identity_experts else contextlib.nullcontext():
        made = built.Built(layer, kernel)
        if inputs.lora is None:
            return made.run(inputs.x, logits)[:, :width], made.name
        with made.inside(), lora.aligning():
            lora.adapt(made, inputs, inputs.lora)
            return made.run(inputs.x, logits)[:, :width], made.name


def _said(inputs: ExpertsInputs, kernel: built.Kernel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, weights and map, with "no expert" as vLLM's routers say it: -1 at weight 0, to kernels that have a map."""
    ids, weights, expert_map = inputs.ids.int(), inputs.weights.float(), inputs.expert_map
    routing.refuse_dropped(ids, on_cpu=kernel == "native" and device.is_cpu())
    absent = ids < 0
    if absent.any():
        weights = weights.masked_fill(absent, 0)
        if expert_map is None:
            expert_map = torch.arange(inputs.experts, device=inputs.x.device)
    return ids, weights, expert_map


@contextlib.contextmanager
def _routing_of_zero_experts(weights: Tensor, ids: Tensor) -> Iterator[None]:
    """Inside, vLLM's router of identity experts has this from its compiled top-k, and does the rest itself."""
    interpreted.require()
    with refusals():  # a release without such a router
        from vllm.model_executor.layers.fused_moe.router import zero_expert_router

    @called_by_engine
    def fused_topk_bias(**_: Any) -> tuple[Tensor, Tensor]:
        return weights.clone(), ids.clone()

    with patch.object(zero_expert_router, "fused_topk_bias", fused_topk_bias):
        yield


def _widened(inputs: ExpertsInputs, multiple: int) -> ExpertsInputs:
    """The same call with x, and so the experts, that many zero columns wider."""
    more = -inputs.x.shape[-1] % multiple
    places = {"experts.w13": (0, more), "experts.w1": (0, more), "experts.w2": (0, 0, 0, more), "experts.b2": (0, more)}
    tensors = {
        name: nn.functional.pad(tensor, places[name]) if name in places else tensor
        for name, tensor in inputs.tensors.items()
    }
    return replace(inputs, x=nn.functional.pad(inputs.x, (0, more)), tensors=tensors)


def _by_function(inputs: ExpertsInputs) -> tuple[Tensor, str]:
    """vLLM's functional entry, which its own benchmarks and out-of-tree models call."""
    runtime.start()
    interpreted.require(inputs.x.dtype)
    words = built.words(inputs.mlp)
    if (
        inputs.identity_experts
        or inputs.output_scale != 1
        or not {"activation", "has_bias"} >= words.keys() - {"apply_router_weight_on_input"}
    ):
        raise Unsupported("vLLM's fused_experts: it takes no clamp, no scale of the sum and no identity experts")
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import config as quantisation
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    ids, weights, expert_map = _said(inputs, "triton")
    first = "13" if inputs.mlp.gated else "1"
    biases = (inputs.tensors.get(f"experts.b{first}"), inputs.tensors.get("experts.b2"))
    w1, w2, by = inputs.tensors[f"experts.w{first}"], inputs.tensors["experts.w2"], ""
    config = quantisation.biased_moe_quant_config(*biases) if inputs.mlp.bias else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(built.vllm_config(inputs.x.dtype)))
        stack.enter_context(interpreted.activations_of(inputs.mlp.width))
        if inputs.quant is not None:
            w1, w2, config, by = stored.stored(inputs)
            if inputs.quant.activations != "no":
                stack.enter_context(interpreted.library())
                stack.enter_context(interpreted.fp8_activations())
        stack.enter_context(refusals())
        found = fused_experts(
            inputs.x.contiguous(),
            w1.contiguous(),
            w2.contiguous(),
            weights,
            ids,
            activation=MoEActivation(words["activation"]),
            apply_router_weight_on_input=inputs.mlp.weight_on == "input",
            global_num_experts=inputs.experts,
            expert_map=None if expert_map is None else expert_map.int(),
            quant_config=config,
        )
    return found, interpreted.said(f"{by} and fused_experts" if by else "fused_experts")
