"""SGLang's fused experts at a given routing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_conformance.engine import ExpertsInputs
from moe_conformance.engines.sglang import built, lora
from moe_conformance.errors import Unsupported


def features() -> frozenset[str]:
    """Every function and form of call that one of SGLang's models or routers makes; kernels refuse what they lack."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: F401

    found = {"gelu", "gelu_tanh", "relu2", "not_gated", "bias", "clamp", "swiglu_oai", "weight_on_input"}
    return frozenset(found | {"output_scale", "dropped_ids", "expert_map", "same_bits", "lora"})


def experts(inputs: ExpertsInputs, kernels: Sequence[built.Kernel]) -> tuple[Tensor, str]:
    """The routed sum [T, D], and what computed it: the first of these kernels that takes the call.

    "No expert" is -1, as SGLang's dispatcher and routers say it.
    """
    return built.by_first(kernels, lambda kernel: _experts(inputs, kernel))


def _experts(inputs: ExpertsInputs, kernel: built.Kernel) -> tuple[Tensor, str]:
    arguments = {}
    if inputs.output_scale != 1:
        if kernel != "triton":
            raise Unsupported(f"experts: {built.NAMES[kernel]} leaves routed_scaling_factor to the model's block")
        arguments = {"routed_scaling_factor": inputs.output_scale}
    layer = built.Layer(
        inputs.mlp, inputs.x.shape[-1], inputs.ids.shape[-1], inputs.x.dtype, inputs.tensors, arguments,
        expert_map=inputs.expert_map,
    )  # fmt: skip
    made = built.Built(layer, kernel)
    if inputs.lora is None:
        return made.run(inputs.x, inputs.ids, inputs.weights), made.name
    lora.adapt(made, inputs, inputs.lora)
    with lora.running():
        return made.run(inputs.x, inputs.ids, inputs.weights), f"{made.name}, with FusedMoEWithLoRA"
