"""SGLang's expert layer, filled and run: FusedMoE, its dispatcher and the code that computes experts.

kernel: "native", what a CPU without AMX computes experts with; "compiled", what torch.compile is given in its place for
one token; "triton", the Triton runner of a GPU, interpreted on a CPU.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec
from moe_conformance.engines.sglang import device, interpreted, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import Unsupported

Kernel = Literal["native", "compiled", "triton"]
NAMES: Mapping[Kernel, str] = {
    "native": "moe_forward_native",
    "compiled": "fused_moe_forward_native",
    "triton": "fused_moe_kernel",
}


def by_first(kernels: Sequence[Kernel], run: Callable[[Kernel], tuple[Tensor, str]]) -> tuple[Tensor, str]:
    """What the first of these kernels gives that takes a call. Raises Unsupported with the reason of each."""
    reasons = []
    for kernel in kernels:
        try:
            return run(kernel)
        except Unsupported as refusal:
            reasons.append(str(refusal))
    raise Unsupported("; ".join(dict.fromkeys(reasons)))


def name_of(kernel: Kernel, dtype: torch.dtype) -> str:
    """How a result names what computed experts."""
    if kernel != "triton":
        return NAMES[kernel]
    told = ", told to compute in float32" if device.is_cpu() and dtype is torch.float32 else ""
    return interpreted.said(NAMES["triton"]) + told


def words(mlp: MLPSpec) -> dict[str, Any]:
    """The arguments by which SGLang's models ask for such experts. Raises Unsupported where none does."""
    plain = MLPSpec(mlp.width, mlp.activation, gated=mlp.gated, dtype=mlp.dtype, bias=mlp.bias, weight_on=mlp.weight_on)
    clamped = MLPSpec(
        mlp.width, clamp=mlp.clamp, limit=mlp.limit, alpha=mlp.alpha, up_offset=mlp.up_offset, dtype=mlp.dtype,
        bias=mlp.bias, weight_on=mlp.weight_on, up_limit=mlp.up_limit,
    )  # fmt: skip
    found: dict[str, Any] = {"is_gated": mlp.gated, "with_bias": mlp.bias}
    form = (mlp.clamp, mlp.alpha == 1, mlp.up_offset)
    if mlp.weight_on == "w2_input":
        raise Unsupported("experts: SGLang's weights multiply an expert's input or output, not what enters w2")
    if mlp == plain and mlp.activation != "relu":
        found["activation"] = mlp.activation
    elif mlp == clamped and form == ("before", True, 0.0):
        found |= {"activation": "silu", "swiglu_limit": mlp.limit}  # DeepSeek-V4
    elif mlp == clamped and form == ("before", False, 1.0):
        found |= {"activation": "silu", "gemm1_alpha": mlp.alpha, "gemm1_clamp_limit": mlp.limit}  # gpt-oss
    elif mlp == clamped and form == ("after", True, 0.0):
        found |= {"activation": "silu", "gemm1_clamp_limit": mlp.limit}  # Step-3.5
    elif mlp == clamped and form == ("tanh", True, 0.0):
        found |= {"activation": "situ", "gemm1_alpha": mlp.limit, "gemm1_clamp_limit": mlp.up_limit or mlp.limit}
    else:
        raise Unsupported(f"experts: no model of SGLang's has experts of {mlp}")
    return found | ({"apply_router_weight_on_input": True} if mlp.weight_on == "input" else {})


@dataclass(frozen=True)
class Layer:
    """What to build. tensors: the experts' of those that are here, canonical. expert_map: [E] local ids, or None.

    ep, tp: rank and size; with either, tensors are of all experts at their full width, and SGLang's own loader cuts out
    what the rank holds. copies: [P], of which expert each physical one is a copy.
    """

    mlp: MLPSpec
    width: int
    top_k: int
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    expert_map: Tensor | None = None
    ep: tuple[int, int] = (0, 1)
    tp: tuple[int, int] = (0, 1)
    copies: Tensor | None = None

    @property
    def divided(self) -> bool:
        return self.ep[1] > 1 or self.tp[1] > 1 or self.copies is not None


class Built:
    """A layer that has been built and filled."""

    def __init__(self, layer: Layer, kernel: Kernel) -> None:
        self.layer, self.kernel = layer, kernel
        if kernel != "triton" and not layer.mlp.gated and layer.mlp.activation != "relu2":
            raise Unsupported("experts: SGLang's one model of experts without a gate has relu2")
        with self.inside():
            self.module = self._construct()
            with torch.no_grad():
                self._load() if layer.divided else self._fill()
            if layer.expert_map is not None and not layer.divided:
                self._set_map(layer.expert_map)
            self.module.quant_method.process_weights_after_loading(self.module)

    @property
    def name(self) -> str:
        return name_of(self.kernel, self.layer.dtype)

    @torch.no_grad()
    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The sum of the experts that are here. x is a copy: a real step's activations are the layer's to overwrite."""
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        logits = torch.zeros(len(x), self.module.num_experts, device=x.device)
        routing = StandardTopKOutput(weights.float().clone(), ids.int().clone(), logits)
        with self.inside(), refusals():
            found: Tensor = self.module(x.contiguous().clone(), routing)
        return found

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, SGLang's modules are those of this layer's kernel, rank and dtype."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(runtime.building(self.layer.dtype))
            if self.layer.divided:
                stack.enter_context(runtime.as_rank(self.layer.ep, self.layer.tp))
            if self.kernel == "triton":
                stack.enter_context(interpreted.as_gpu(self.layer.dtype))
            if self.kernel == "compiled":
                stack.enter_context(_compiled())
            yield

    def _construct(self) -> Any:
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        layer = self.layer
        offered: dict[str, Any] = {
            "num_experts": len(layer.tensors["experts.w2"]) if layer.copies is None else len(layer.copies),
            "hidden_size": layer.width,
            "intermediate_size": layer.mlp.width,
            "layer_id": 0,
            "top_k": layer.top_k,
            "params_dtype": layer.dtype,
            "prefix": "model.layers.0.mlp.experts",
            "uses_expert_location": False,
            **words(layer.mlp),
            **layer.arguments,
        }
        wanted = inspect.signature(FusedMoE).parameters
        if absent := sorted(offered.keys() - wanted.keys() - {"uses_expert_location"}):
            raise Unsupported(f"FusedMoE of this release has no argument {', '.join(absent)}")
        with refusals():
            return FusedMoE(**{name: value for name, value in offered.items() if name in wanted})

    def _parameters(self) -> dict[str, Any]:
        return dict(self.module.named_parameters(recurse=False))

    def _fill(self) -> None:
        """Gate above up, or their rows in turns as for gpt-oss; biases in float32."""
        tensors, first = self.layer.tensors, "13" if self.layer.mlp.gated else "1"
        parameters = self._parameters()
        parameters["w13_weight"].copy_(self._turned(tensors[f"experts.w{first}"]))
        parameters["w2_weight"].copy_(tensors["experts.w2"])
        if self.layer.mlp.bias:
            parameters["w13_weight_bias"].copy_(self._turned(tensors[f"experts.b{first}"]))
            parameters["w2_weight_bias"].copy_(tensors["experts.b2"])

    def _turned(self, w13: Tensor) -> Tensor:
        if "gemm1_alpha" not in words(self.layer.mlp) or words(self.layer.mlp)["activation"] == "situ":
            return w13
        gate, up = w13.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)

    def _load(self) -> None:
        """Offer SGLang's loader every expert; it keeps what this rank holds, in its place."""
        mlp, tensors, parameters = self.layer.mlp, self.layer.tensors, self._parameters()
        for parameter in parameters.values():
            parameter.zero_()
        if mlp.bias or "gemm1_alpha" in words(mlp):
            raise Unsupported("shard: SGLang's gpt-oss slices biased experts itself, in its model's loader")
        first = "13" if mlp.gated else "1"
        copies = range(len(tensors["experts.w2"])) if self.layer.copies is None else self.layer.copies.tolist()
        for expert, copied in enumerate(copies):
            value = tensors[f"experts.w{first}"][copied]
            parts = [("w13", "w1", value[: mlp.width]), ("w2", "w2", tensors["experts.w2"][copied])]
            if mlp.gated:
                parts.append(("w13", "w3", value[mlp.width :]))
            for name, part, loaded in parts:
                parameter = parameters[f"{name}_weight"]
                parameter.weight_loader(parameter, loaded, f"experts.{name}_weight", shard_id=part, expert_id=expert)

    def _set_map(self, expert_map: Tensor) -> None:
        """Put the map where the dispatcher keeps its own, as under expert parallelism."""
        module, dispatcher = self.module, self.module.dispatcher
        dispatcher.moe_ep_size, dispatcher.local_expert_mapping = 2, expert_map.int()
        for config in {id(found): found for found in (module.moe_runner_config, module.runner.config)}.values():
            config.num_experts = len(expert_map)
        module.num_experts = len(expert_map)


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Inside, experts are computed by the function that torch.compile is given for one token."""
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    def forward_native(self: Any, layer: Any, dispatch_output: Any) -> Any:
        return fused_moe_forward_native(layer, dispatch_output)

    with patch.object(UnquantizedFusedMoEMethod, "forward_native", forward_native):
        yield
