"""SGLang's routers, given logits: TopK and HashTopK, asked for as its models ask for them.

platform: "native", what a CPU routes by (`forward_native`); "gpu", what a GPU does (`forward_cuda`), as far as that is
torch or Triton. Routers that are compiled (FlashInfer's, JIT, sgl_kernel's) are not judged on a CPU.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import RouteInputs, Routing, RoutingSpec
from moe_conformance.engines.sglang import device, interpreted, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import Unsupported

Platform = Literal["native", "gpu"]

_TOPK = "sglang.srt.layers.moe.topk"
# Functions of its modules that route, by which a result names what did.
_ROUTERS: Mapping[str, tuple[str, ...]] = {
    _TOPK: (
        "fused_topk_native", "fused_topk", "grouped_topk", "biased_grouped_topk", "biased_grouped_topk_impl",
        "kimi_k2_biased_topk_impl",
    ),
    "sglang.kernels.ops.moe.moe_fused_gate": ("moe_fused_gate",),
    "sglang.kernels.ops.moe.triton_hash_topk": ("hash_topk_triton",),
}  # fmt: skip


def features() -> frozenset[str]:
    """What its models ask their routers for, whether or not a router then does it."""
    import_module(_TOPK)
    found = {"softmax", "sigmoid", "renormalize", "not_renormalized", "score_of_chosen", "input_precision"}
    found |= {"selection_bias", "groups", "group_top2", "group_mask", "routed_scale", "per_expert_scale"}
    found |= {"sparsemixer", "identity_experts", "padding_rows", "fused_shared"}
    with contextlib.suppress(ImportError):
        import_module("sglang.srt.layers.moe.hash_topk")
        found |= {"sqrt_softplus", "table"}
    return frozenset(found)


def route(inputs: RouteInputs, platform: Platform) -> tuple[Routing, str]:
    """The answer, and the name of the function that gave it."""
    runtime.start()
    spec, logits = inputs.routing, as_projected(inputs.routing, inputs.logits)
    hidden = logits.new_zeros(len(logits), 1)
    more: dict[str, Any] = {}
    if inputs.valid_rows is not None:
        more["num_token_non_padded"] = torch.tensor(inputs.valid_rows, dtype=torch.int32, device=logits.device)
    with _fusing(inputs, platform), _as_on(platform), refusals(), heard() as names:
        if platform == "gpu" and is_gemma4(spec):
            return _gemma4_by_triton(inputs), interpreted.said("gemma4_fused_routing")
        if platform == "gpu" and spec.identity_experts:
            raise Unsupported("route: SGLang's LongCat routes on a GPU by what a CPU does, and is judged with it")
        if spec.selector == "table":
            router, more["input_ids"] = _hash(spec, inputs), inputs.token_ids
        else:
            router = _router(spec, inputs)
        answer = router(hidden, logits, **more)
    name = names[-1] if names else getattr(router, "__name__", type(router).__name__)
    return Routing(answer.topk_ids, answer.topk_weights.float()), _named(name, platform)


def _named(name: str, platform: Platform) -> str:
    return interpreted.said(name) if name in ("moe_fused_gate", "hash_topk_triton") else f"{name}, as on {platform}"


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Inside, the names of the functions of _ROUTERS that are called; the one that computes is last."""
    names: list[str] = []

    def listening(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(getattr(real, "__name__", name))
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for place, functions in _ROUTERS.items():
            with contextlib.suppress(ImportError):
                module = import_module(place)
                for name in functions:
                    if (real := getattr(module, name, None)) is not None:
                        stack.enter_context(patch.object(module, name, listening(name, real)))
        yield names


@contextlib.contextmanager
def _as_on(platform: Platform) -> Iterator[None]:
    if platform == "native":
        yield
        return
    with interpreted.as_gpu(), interpreted.library():
        yield


@contextlib.contextmanager
def _fusing(inputs: RouteInputs, platform: Platform) -> Iterator[None]:
    """Inside, the model that routers are made for has this many shared experts as slots."""
    fused = inputs.fused_shared
    if fused is None:
        yield
        return
    spec, scale = inputs.routing, inputs.routing.scale
    if platform == "native" and device.is_cpu():
        raise Unsupported("route: SGLang's models fuse shared experts into routing on GPUs alone")
    # A weight of 1, where routed weights have their scale; its inverse, where the sum is scaled afterwards.
    if fused.rule != "constant" or fused.weight not in (1.0, 1.0 / scale) or fused.count > 1:
        raise Unsupported(f"route: SGLang gives one shared expert a weight of 1, or of 1 / the scale; got {fused}")
    if spec.identity_experts or spec.selector != "topk" or not (spec.groups > 1 or spec.selection_bias):
        raise Unsupported("route: no model of SGLang's fuses shared experts behind this router")
    try:
        from sglang.srt.configs.shared_experts import SharedExpertsConfig
    except ImportError:
        yield  # to 0.5.20 each router is told by its model
        return
    from sglang.srt.runtime_context import get_model

    with get_model().override(shared_experts=SharedExpertsConfig(num_fused_shared_experts=fused.count)):
        yield


def _router(spec: RoutingSpec, inputs: RouteInputs) -> Any:
    if is_gemma4(spec):
        return gemma4(spec, inputs.tensors["router.per_expert_scale"])
    asked = arguments(spec, inputs.tensors)
    topk = import_module(_TOPK)
    offered = {"layer_id": 0, "output_format": topk.TopKOutputFormat.STANDARD, **asked}
    wanted = inspect.signature(topk.TopK).parameters
    if absent := sorted(offered.keys() - wanted.keys() - {"layer_id", "output_format"}):
        raise Unsupported(f"route: TopK of this release has no argument {', '.join(absent)}")
    fused = inputs.fused_shared
    if fused is not None and fused.weight != 1.0:  # the sum is scaled afterwards, and no weight before
        offered["apply_routed_scaling_factor_on_output"] = False
    top_k = spec.top_k
    if fused is not None and "num_fused_shared_experts" in wanted:  # where routers are told, as a part of their top_k
        offered["num_fused_shared_experts"], top_k = fused.count, top_k + fused.count
    return topk.TopK(top_k, **{name: value for name, value in offered.items() if name in wanted})


def arguments(spec: RoutingSpec, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What SGLang's models of this method hand to TopK. Raises Unsupported where none of them routes so.

    Not handed on, and so for the cases to find: the dtype of scores, a number added to a sum or a floor under it, and
    the number that experts of other groups count as.
    """
    plain = RoutingSpec(
        spec.top_k, renormalize=spec.renormalize, epsilon=spec.epsilon, floor=spec.floor, score=spec.score,
        score_dtype=spec.score_dtype,
    )  # fmt: skip
    chosen = RoutingSpec(spec.top_k, select_on="logits", score_dtype=spec.score_dtype)
    bias = tensors.get("router.selection_bias")
    if spec.renormalize == "norm":
        raise Unsupported("route: SGLang's models divide weights by their sum alone (its DBRX, too)")
    asked: dict[str, Any] = {"renormalize": spec.renormalize == "sum"}
    if spec.scale != 1:
        asked |= {"routed_scaling_factor": spec.scale, "apply_routed_scaling_factor_on_output": True}
    if bias is not None:
        asked["correction_bias"] = bias.float()
    if spec == chosen:
        return {"renormalize": True}  # gpt-oss: a softmax over all, divided by the sum of the chosen
    if spec == replace(chosen, score="sigmoid", score_dtype="float32"):
        from sglang.srt.models.llama4 import Llama4MoE

        return asked | {"custom_routing_function": Llama4MoE.custom_routing_function}
    if spec.selector == "sparsemixer":
        return asked | {"custom_routing_function": _phimoe(spec)}
    if spec == plain and spec.score == "softmax":
        return asked
    ungrouped = replace(
        plain, selection_bias=spec.selection_bias, scale=spec.scale, identity_experts=spec.identity_experts
    )
    scoring = {"scoring_func": spec.score.replace("_", "")}
    # Of the models without groups, those of DeepSeek's code pass on one, and LongCat, ERNIE and others none.
    if spec == ungrouped and not (spec.score == "sigmoid" and spec.selection_bias and spec.epsilon == 1e-20):
        return asked | scoring
    grouped = replace(
        plain, selection_bias=spec.selection_bias, groups=spec.groups, top_groups=spec.top_groups, scale=spec.scale,
        group_score="top2_sum" if spec.selection_bias and spec.groups > 1 else "max", group_mask=spec.group_mask,
    )  # fmt: skip
    score = "sigmoid" if spec.selection_bias else spec.score
    if (spec if spec.groups > 1 else replace(spec, group_score="max")) != replace(grouped, score=score):
        raise Unsupported(f"route: no model of SGLang's routes by {spec}")
    groups = {"use_grouped_topk": True, "num_expert_group": spec.groups, "topk_group": spec.top_groups}
    return asked | groups | scoring


def as_projected(spec: RoutingSpec, logits: Tensor) -> Tensor:
    """A copy of the logits, in float32 where the gates of models that route so put out float32.

    GLM-4, HY-V3, LongCat and others with a bias and no groups. Those of DeepSeek and ERNIE are in the model's dtype.
    """
    is_float32 = spec.selection_bias and spec.groups == 1 and spec.score_dtype == "float32" and not spec.floor
    return logits.to(torch.float32 if is_float32 else logits.dtype, copy=True)


def _phimoe(spec: RoutingSpec) -> Any:
    from sglang.srt.models.phimoe import phimoe_routing_function, sparsemixer

    jitter = inspect.signature(sparsemixer).parameters["jitter_eps"].default
    if spec.jitter != jitter or spec.top_k != 2:
        raise Unsupported(f"route: SGLang's SparseMixer takes two experts by a threshold of {jitter}; got {spec}")
    return phimoe_routing_function


def _hash(spec: RoutingSpec, inputs: RouteInputs) -> Any:
    """DeepSeek-V4's router by token id: in torch, which it is without the fused kernel, or the Triton kernel."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.moe.hash_topk import HashTopK

    want = RoutingSpec(
        spec.top_k, selector="table", score="sqrt_softplus", score_dtype=spec.score_dtype, renormalize="sum",
        epsilon=spec.epsilon, scale=spec.scale,
    )  # fmt: skip
    if spec != want or inputs.token_ids is None:
        raise Unsupported(f"route: no model of SGLang's routes by {spec}")
    table = inputs.tensors["router.table"].int()
    # To 0.5.20 it is told of shared experts that are slots.
    fused = {"num_fused_shared_experts": 0}
    router = HashTopK(
        spec.top_k, inputs.logits.shape[-1], vocab_size=len(table), layer_id=0, routed_scaling_factor=spec.scale,
        apply_routed_scaling_factor_on_output=spec.scale != 1,
        **{name: count for name, count in fused.items() if name in inspect.signature(HashTopK).parameters},
    )  # fmt: skip
    router.tid2eid.data.copy_(table)
    native = import_module("sglang.kernels.ops.moe.dsv4")

    def forward(*args: Any, **kwargs: Any) -> Any:
        fused = import_module(_TOPK)._is_cuda
        with (
            patch.object(envs.SGLANG_OPT_USE_FUSED_HASH_TOPK, "get", lambda: fused),
            patch.object(native, "is_hip_runtime", lambda: device.is_cpu()),  # whose kernel is Triton
        ):
            return router(*args, **kwargs)

    forward.__name__ = "HashTopK"
    return forward


def is_gemma4(spec: RoutingSpec) -> bool:
    return spec == RoutingSpec(spec.top_k, renormalize="sum", per_expert_scale=True)


def gemma4(spec: RoutingSpec, scale: Tensor) -> Any:
    """The TopK of SGLang's Gemma 4, whose routing function reaches back for a parameter of the block."""
    model = import_module("sglang.srt.models.gemma4_causal")
    config = SimpleNamespace(num_experts=len(scale), top_k_experts=spec.top_k, moe_intermediate_size=8, hidden_size=8)
    with runtime.building(torch.float32):
        block = model.Gemma4MoE(8, 0, config)
    block.per_expert_scale.data.copy_(scale)
    return block.topk


def _gemma4_by_triton(inputs: RouteInputs) -> Routing:
    """The kernel that SGLang's Gemma 4 calls for tensors on a GPU."""
    kernel = import_module("sglang.srt.models.gemma4_causal").gemma4_fused_routing
    interpreted.require(inputs.logits.dtype)
    weights, ids = kernel(inputs.logits, inputs.tensors["router.per_expert_scale"], inputs.routing.top_k)
    return Routing(ids, weights)
