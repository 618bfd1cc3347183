"""One rank's part of vLLM's expert layer: its weight loader cuts out what the rank holds, and its kernel runs on it.

Under expert parallelism vLLM divides experts among all ranks, and no expert's width; otherwise ranks divide widths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_conformance.engine import MLPSpec, ShardInputs, called_by_engine
from moe_conformance.engines.vllm import built, device, eplb, routing, runtime
from moe_conformance.engines.vllm.refusing import all_of
from moe_conformance.errors import Absent, Unsupported


def features() -> frozenset[str]:
    found = {"gelu", "gelu_tanh", "relu2", "not_gated", "bias", "clamp", "swiglu_oai", "output_scale", "same_bits"}
    return frozenset(found | {"dropped_ids", "shared", "tensor_parallel", "replicas"})


def shard(inputs: ShardInputs, kernels: Sequence[built.Kernel]) -> tuple[Tensor, str]:
    """This rank's part and what computed it, by the first kernel that takes it, before vLLM would sum it over ranks."""
    runtime.start()
    if inputs.ep_size > 1 and inputs.tp_size > 1:
        raise Absent("shard: under expert parallelism vLLM's ranks divide experts, and no expert's width")
    if inputs.whole.identity_experts:
        raise Unsupported("shard: vLLM adds what identity experts pass on to the sum over ranks, and to no part of it")
    refused = []
    for kernel in kernels:
        try:
            if kernel != "fused_experts":
                return _part(inputs, kernel)
        except Unsupported as refusal:
            refused.append(refusal)
    raise all_of(refused)


def _part(inputs: ShardInputs, kernel: built.Kernel) -> tuple[Tensor, str]:
    whole = inputs.whole
    ids = whole.ids.int()
    expert_map: Tensor | None = inputs.expert_map
    if inputs.physical_to_logical is not None:
        state = eplb.state_of(inputs.physical_to_logical, whole.experts)
        ids = eplb.physical_ids(ids, state, len(ids))
    absent = ids < 0
    routing.refuse_dropped(ids, on_cpu=kernel == "native" and device.is_cpu())
    if inputs.ep_size == 1:
        expert_map = torch.arange(len(inputs.expert_map), device=whole.x.device) if absent.any() else None
    weights = whole.weights.float().masked_fill(absent, 0)

    @called_by_engine
    def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return weights.clone(), ids.clone()

    arguments: dict[str, Any] = {"custom_routing_function": route}
    if whole.output_scale != 1:
        arguments |= {"routed_scaling_factor": whole.output_scale, "apply_routed_scale_to_output": True}
    # Shared experts are divided by width among all ranks, whatever divides the routed ones.
    rank, size = inputs.ep_rank * inputs.tp_size + inputs.tp_rank, inputs.ep_size * inputs.tp_size
    if inputs.shared is not None:
        with runtime.building(built.vllm_config(whole.x.dtype), whole.x.dtype), _as_rank(rank, size):
            arguments["shared_experts"] = _shared(inputs)
    layer = built.Layer(
        whole.mlp, whole.x.shape[-1], ids.shape[-1], whole.x.dtype, whole.tensors, arguments, expert_map=expert_map,
        copies=inputs.physical_to_logical, tensor_parallel=(inputs.tp_rank, inputs.tp_size),
    )  # fmt: skip
    with _as_rank(inputs.tp_rank, inputs.tp_size):
        part = built.Built(layer, kernel)
    return part.run(whole.x, whole.x.new_zeros(len(whole.x), whole.experts)), part.name


@contextlib.contextmanager
def _as_rank(rank: int, size: int) -> Iterator[None]:
    """Inside, vLLM's modules are built and loaded as this rank of a tensor-parallel group does it."""
    modules = [import_module(f"vllm.model_executor.{name}") for name in ("layers.linear", "parameter")]
    modules += [import_module(f"vllm.model_executor.layers.fused_moe.{name}") for name in ("config", "layer")]
    answers = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": size}
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, answer in answers.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, lambda answer=answer: answer))
        yield


def _shared(inputs: ShardInputs) -> nn.Module:
    """A shared expert as a model hands it in, its slices loaded by its own parameters' loaders."""
    spec, tensors, hidden = inputs.shared, inputs.shared_tensors, inputs.whole.x.shape[-1]
    from vllm.model_executor.models.nemotron_h import NemotronHMLP
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

    assert spec is not None
    if spec == MLPSpec(spec.width):
        module = Qwen2MoeMLP(hidden, spec.width, "silu", reduce_results=False, prefix="shared")
        gate, up = tensors["shared.w13"].chunk(2)
        loads: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("gate_up_proj.weight", (gate, 0)), ("gate_up_proj.weight", (up, 1)),
        )  # fmt: skip
    elif spec == MLPSpec(spec.width, "relu2", gated=False):
        module = NemotronHMLP(None, hidden, spec.width, reduce_results=False, prefix="shared")
        loads = (("up_proj.weight", (tensors["shared.w1"],)),)
    else:
        raise Unsupported(f"shard: no model of vLLM's has a shared expert of {spec}")
    parameters = dict(module.named_parameters())
    for name, values in (*loads, ("down_proj.weight", (tensors["shared.w2"],))):
        parameters[name].weight_loader(parameters[name], *values)
    for part in module.modules():
        if getattr(part, "quant_method", None) is not None:
            part.quant_method.process_weights_after_loading(part)
    return module
