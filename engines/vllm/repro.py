"""How a script calls vLLM as this adapter does: its expert layer on a CPU, at a routing that is handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Repro, Unsupported
from moe_conformance.engines.vllm import built, device, runtime

_SOURCE = """\
import json
import tempfile
from pathlib import Path

import vllm.model_executor.layers.fused_moe as fused_moe
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context

model = {{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}}
model |= {{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(model | {{"num_local_experts": 1, "max_position_embeddings": 256}}))
lengths = {{"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}}
config = EngineArgs(
    str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype={dtype!r}, **lengths
).create_engine_config()


def route(hidden_states, gating_output, topk, renormalize):
    return t["weights"].clone(), t["ids"].clone()


with set_current_vllm_config(config):
    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"file://{{folder}}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
    layer = fused_moe.{factory}(
        prefix="repro.experts",
        params_dtype=torch.{dtype},
        custom_routing_function=route,
        **{arguments},
    )
    experts = getattr(layer, "routed_experts", layer)
    D, F = {width}, {intermediate}
    for parameter in experts.parameters(recurse=False):
        parameter.data.zero_()
    experts.w2_weight.data[:, :D, :F] = t["experts.w2"]
    w13, half = experts.w13_weight.data, experts.w13_weight.shape[1] // 2
    w13[:, :F, :D], w13[:, half : half + F, :D] = t["experts.w13"].chunk(2, dim=1)
    experts.quant_method.process_weights_after_loading(experts)
    with override_forward_context(create_forward_context(None, config)):
        logits = torch.zeros(len(t["x"]), {experts})
        got = layer(hidden_states=t["x"].clone(), router_logits=logits)[:, :D]
"""


def repro(inputs: Any, kernels: Sequence[built.Kernel]) -> Repro:
    """Of gated experts without biases on a CPU. Raises Unsupported for anything else."""
    if not isinstance(inputs, ExpertsInputs):
        raise Unsupported("repro: this stage is shown through the adapter")
    if kernels[0] != "native" or not device.is_cpu() or inputs.x.device.type != "cpu":
        raise Unsupported("repro: this kernel is driven by the adapter, whose interpreter runs it")
    is_plain = inputs.mlp.gated and not inputs.mlp.bias and inputs.expert_map is None and not inputs.identity_experts
    if not is_plain or inputs.output_scale != 1 or (inputs.ids < 0).any():
        raise Unsupported("repro: these experts are shown through the adapter")
    runtime.start()
    dtype = str(inputs.x.dtype).removeprefix("torch.")
    layer = built.Layer(inputs.mlp, inputs.x.shape[-1], inputs.ids.shape[-1], inputs.x.dtype, inputs.tensors)
    arguments = built.arguments_of(layer, "native")
    if arguments["activation"] == "swigluoai":
        raise Unsupported("repro: gate and up are interleaved, which the adapter does")
    source = _SOURCE.format(
        dtype=dtype,
        factory=built.factory().__name__,
        arguments={name: value for name, value in arguments.items() if name not in ("prefix", "params_dtype")},
        width=inputs.x.shape[-1],
        intermediate=inputs.mlp.width,
        experts=inputs.experts,
    )
    tensors: dict[str, Tensor] = {**inputs.tensors, "x": inputs.x, "ids": inputs.ids.int(), "weights": inputs.weights}
    return Repro(source, tensors)
