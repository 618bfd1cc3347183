"""vLLM's routers, given logits: asked for as its models ask for them, and made by its own factory.

platform: "native", what the build routes by; "gpu", what one for an NVIDIA GPU does, as far as that is torch or
Triton; "rocm", what one with AITER's experts does, whose router with a bias is torch. Compiled top-k operators of a GPU
are not in a build for a CPU, and nothing stands in for them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import Absent, RouteInputs, Routing, RoutingSpec, called_by_engine
from moe_conformance.engines.vllm import device, gemma4, interpreted, registry, runtime
from moe_conformance.engines.vllm.refusing import all_of, refusals
from moe_conformance.errors import Unsupported

Platform = Literal["native", "gpu", "rocm"]

_LAYERS = "vllm.model_executor.layers.fused_moe"
# Where select_experts lives in the releases whose CPU has no router of its own: plain torch, newest place first.
_PLACES = ("cpu_fused_moe", "experts.cpu_moe")


def features() -> frozenset[str]:
    """What the models of this release ask their routers for, whether or not a router then does it."""
    import vllm.model_executor.models.gemma4  # noqa: F401

    found = {"softmax", "sigmoid", "renormalize", "not_renormalized", "score_of_chosen", "input_precision"}
    found |= {"selection_bias", "groups", "group_top2", "group_mask", "routed_scale", "per_expert_scale"}
    found |= {"sparsemixer", "identity_experts", "padding_rows"}
    if "shared_expert_weight" in _factory_words():
        found.add("fused_shared")
    if "hash_indices_table" in _factory_words():
        found |= {"sqrt_softplus", "table"}
    if _inkling() is not None:
        found |= {"global_scale", "shared_classes"}
    return frozenset(found)


def route(inputs: RouteInputs, platforms: Sequence[Platform]) -> tuple[Routing, str]:
    """The answer and the name of the router, of the first of these platforms whose router takes the call.

    Raises Unsupported with the reason of each.
    """
    refused = []
    for platform in platforms if device.is_cpu() else ("native",):
        try:
            return _route(inputs, platform)
        except Unsupported as refusal:
            refused.append(refusal)
    raise all_of(refused)


def _route(inputs: RouteInputs, platform: Platform) -> tuple[Routing, str]:
    runtime.start()
    spec, logits = inputs.routing, as_projected(inputs.routing, inputs.logits)
    if spec.shared_classes or spec.global_scale:
        return _by_inkling(inputs), "InklingGate, interpreted"
    if gemma4.is_gemma4(spec):
        _refuse_fused(inputs)
        if platform == "native" and device.is_cpu():
            return gemma4.route(inputs), "Gemma 4's routing function"
        return _gemma4_by_triton(inputs), "gemma4_fused_routing_kernel_triton, interpreted"
    asked = arguments(spec, inputs.tensors, logits.shape[-1])
    if inputs.fused_shared is not None:
        asked |= _fused(inputs, platform)
    hidden = logits.new_zeros(len(logits), 1)
    with routers_of(platform), refusals():
        if platform == "native" and (select := select_experts()) is not None:
            return _by_function(select, inputs, hidden, asked), f"{select.__module__}.select_experts"
        router = _made(asked, spec.top_k, logits.shape[-1])
        if spec.identity_experts:
            return _with_identity(router, hidden, inputs), _named(router, platform)
        more = {} if inputs.token_ids is None else {"input_ids": inputs.token_ids}
        weights, ids = router.select_experts(hidden_states=hidden, router_logits=logits, **more)
    return Routing(ids, weights), _named(router, platform)


def _named(router: Any, platform: Platform) -> str:
    return f"{type(router).__name__}, as on {device.kind() if platform == 'native' else platform}"


def arguments(spec: RoutingSpec, tensors: Any, classes: int) -> dict[str, Any]:
    """What vLLM's models of this method hand to its factory. Raises Unsupported where none of them routes so.

    Not handed on, and so for the cases to find: the dtype of scores, a number added to a sum or a floor under it, and
    the number that experts of other groups count as.
    """
    plain = RoutingSpec(
        spec.top_k, renormalize=spec.renormalize, epsilon=spec.epsilon, floor=spec.floor, score=spec.score,
        score_dtype=spec.score_dtype,
    )  # fmt: skip
    chosen = RoutingSpec(spec.top_k, select_on="logits", score_dtype=spec.score_dtype)
    bias = tensors.get("router.selection_bias")
    scaled: dict[str, Any] = {} if spec.scale == 1 else {"routed_scaling_factor": spec.scale}
    if spec.renormalize == "norm":
        raise Unsupported("route: vLLM's models divide weights by their sum alone (its DBRX, too)")
    asked = {"renormalize": spec.renormalize == "sum"}
    if bias is not None:
        asked["e_score_correction_bias"] = bias.float()
    if spec == chosen:
        return {"renormalize": True}
    if spec == replace(chosen, score="sigmoid", score_dtype="float32"):
        return asked | {"custom_routing_function": _llama4()}
    if spec.selector == "sparsemixer":
        return asked | {"custom_routing_function": _phimoe(spec)}
    if spec.selector == "table" and spec == replace(plain, selector="table", scale=spec.scale):
        return asked | scaled | {"scoring_func": "sqrtsoftplus", "hash_indices_table": tensors["router.table"].int()}
    if spec.identity_experts and spec == replace(
        plain, selection_bias=True, scale=spec.scale, identity_experts=spec.identity_experts
    ):
        zero = {"zero_expert_type": "identity", "num_logical_experts": classes - spec.identity_experts}
        return asked | scaled | zero
    if spec == plain and spec.score == "softmax":
        return asked
    biased = replace(plain, selection_bias=True, scale=spec.scale)
    if spec == biased and spec.score == "softmax":
        return asked | scaled  # ERNIE 4.5
    if spec == biased and spec.score == "sqrt_softplus":
        return asked | scaled | {"scoring_func": "sqrtsoftplus"}
    # Models without groups pass on one. With a bias the two best of a group are added up, without one the best counts.
    grouped = replace(
        plain, selection_bias=spec.selection_bias, groups=spec.groups, top_groups=spec.top_groups, scale=spec.scale,
        group_score="top2_sum" if spec.selection_bias and spec.groups > 1 else "max", group_mask=spec.group_mask,
    )  # fmt: skip
    if (spec if spec.groups > 1 else replace(spec, group_score="max")) != grouped or spec.score == "sqrt_softplus":
        kind = Unsupported if registry.routes(spec, classes) else Absent
        raise kind(f"route: no model of vLLM's routes by {spec}")
    groups = {"use_grouped_topk": True, "num_expert_group": spec.groups, "topk_group": spec.top_groups}
    return asked | scaled | groups | {"scoring_func": spec.score}


def as_projected(spec: RoutingSpec, logits: Tensor) -> Tensor:
    """A copy of the logits, in float32 where the projection of every model that routes so puts out float32.

    AFMoE, HY-V3, ERNIE 4.5 and LongCat. DeepSeek's own put out the model's dtype, unless its config says otherwise.
    """
    is_float32 = spec.selection_bias and spec.groups == 1 and spec.score_dtype == "float32"
    return logits.to(torch.float32 if is_float32 else logits.dtype, copy=True)


def _llama4() -> Callable[..., Any]:
    from vllm.model_executor.models.llama4 import Llama4MoE

    function: Callable[..., Any] = Llama4MoE.custom_routing_function
    return function


def _phimoe(spec: RoutingSpec) -> Callable[..., Any]:
    from vllm.model_executor.models.phimoe import phimoe_routing_function, sparsemixer

    jitter = inspect.signature(sparsemixer).parameters["jitter_eps"].default
    if spec.jitter != jitter or spec.top_k != 2:
        raise Unsupported(f"route: vLLM's SparseMixer takes two experts by a threshold of {jitter}; got {spec}")
    function: Callable[..., Any] = phimoe_routing_function
    return function


def _fused(inputs: RouteInputs, platform: Platform) -> dict[str, Any]:
    """Shared experts as slots, each of one weight."""
    fused = inputs.fused_shared
    assert fused is not None
    spec = inputs.routing
    if fused.rule != "constant" or spec.groups > 1 or not spec.selection_bias or spec.identity_experts:
        raise Unsupported(
            "route: but for AITER's compiled kernels, vLLM's router with a bias alone fuses shared experts"
        )
    if platform == "native" and device.is_cpu():
        raise Unsupported("route: vLLM never fuses shared experts into routing on a CPU")
    return {"num_fused_shared_experts": fused.count, "shared_expert_weight": fused.weight}


def _refuse_fused(inputs: RouteInputs) -> None:
    if inputs.fused_shared is not None:
        raise Unsupported("route: no model of vLLM's fuses shared experts behind this router")


@contextlib.contextmanager
def routers_of(platform: Platform) -> Iterator[None]:
    """Inside, vLLM's factory makes the routers of this platform."""
    if platform == "native":
        yield
        return
    with contextlib.ExitStack() as stack:
        modules = []
        for name in ("router.router_factory", "router.custom_routing_router"):
            with contextlib.suppress(ImportError):
                modules.append(import_module(f"{_LAYERS}.{name}"))
        stack.enter_context(interpreted.as_gpu(*modules))
        with contextlib.suppress(ImportError):
            biased = import_module(f"{_LAYERS}.router.fused_topk_bias_router")
            if platform == "rocm":
                stack.enter_context(patch.object(biased, "rocm_aiter_ops", _AITER))
            elif hasattr(biased, "can_use_dsv4_topk"):
                interpreted.require()
                for name in ("can_use_dsv4_topk", "dsv4_topk"):
                    kernel = getattr(interpreted.read_as_gpu(f"{_LAYERS}.router.dsv4_topk"), name)
                    stack.enter_context(patch.object(biased, name, kernel))
        yield


class _Aiter:
    """What a router asks of AITER, which is compiled for ROCm: that it is there, and nothing that it computes."""

    def is_fused_moe_enabled(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        raise Unsupported(f"AITER's {name}: it is compiled for ROCm")


_AITER = _Aiter()


def _factory_words() -> frozenset[str]:
    factory = import_module(f"{_LAYERS}.router.router_factory")
    return frozenset(inspect.signature(factory.create_fused_moe_router).parameters)


def refuse_dropped(ids: Tensor, on_cpu: bool) -> None:
    """Raise Unsupported for pairs without an expert where no router of vLLM's leaves one, for a CPU or in a release.

    Its routers say -1 at weight 0, for rows that are padding.
    """
    if (ids < 0).any() and (on_cpu or "skip_padding" not in _factory_words()):
        where = "for a CPU" if on_cpu else "of this release"
        raise Unsupported(f"vLLM: no router {where} leaves a pair without an expert")


def _made(asked: dict[str, Any], top_k: int, classes: int) -> Any:
    factory = import_module(f"{_LAYERS}.router.router_factory")
    wanted = _factory_words()
    if absent := sorted(asked.keys() - wanted - {"shared_expert_weight"}):
        raise Unsupported(f"route: the factory of this release has no argument {', '.join(absent)}")
    offered = {"top_k": top_k, "global_num_experts": classes, **asked}
    if "e_score_correction_bias" in offered:
        # Routers read its .data.
        offered["e_score_correction_bias"] = torch.nn.Parameter(offered["e_score_correction_bias"], requires_grad=False)
    return factory.create_fused_moe_router(**{name: value for name, value in offered.items() if name in wanted})


def select_experts() -> Callable[..., Any] | None:
    """select_experts of the releases whose factory makes no router for a CPU; None elsewhere."""
    if not device.is_cpu():
        return None
    with contextlib.suppress(ImportError):
        import_module(f"{_LAYERS}.router.cpu_router")
        return None
    for place in _PLACES:
        with contextlib.suppress(ImportError):
            found = import_module(f"{_LAYERS}.{place}")
            if hasattr(found, "select_experts"):
                function: Callable[..., Any] = found.select_experts
                return function
    return None


def as_function(select: Callable[..., Any], asked: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """select_experts in the form of a custom routing function. Raises Unsupported where it lacks an argument."""
    if absent := sorted(asked.keys() - inspect.signature(select).parameters.keys()):
        raise Unsupported(f"route: select_experts of this release's CPU has no argument {', '.join(absent)}")
    call = {"use_grouped_topk": False, **asked}

    @called_by_engine
    def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        weights, ids = select(hidden_states=hidden_states, router_logits=gating_output, top_k=topk, **call)
        return weights, ids

    return route


def _by_function(select: Callable[..., Any], inputs: RouteInputs, hidden: Tensor, asked: dict[str, Any]) -> Routing:
    spec = inputs.routing
    weights, ids = as_function(select, asked)(hidden, as_projected(spec, inputs.logits), spec.top_k, False)
    return Routing(ids, weights)


def _with_identity(router: Any, hidden: Tensor, inputs: RouteInputs) -> Routing:
    """Ids and weights as the router has them before it adds what identity experts pass on, and takes them out."""
    module = import_module(type(router).__module__)
    found: list[tuple[Tensor, Tensor]] = []
    compute = module.zero_experts_compute_triton

    def listening(*, expert_indices: Tensor, expert_scales: Tensor, **others: Any) -> Tensor:
        found.append((expert_scales.clone(), expert_indices.clone()))
        return compute(expert_indices=expert_indices, expert_scales=expert_scales, **others)

    interpreted.require()
    with patch.object(module, "zero_experts_compute_triton", listening):
        router.select_experts(hidden_states=hidden, router_logits=as_projected(inputs.routing, inputs.logits))
    weights, ids = found[0]
    return Routing(ids, weights)


def _gemma4_by_triton(inputs: RouteInputs) -> Routing:
    """The fused kernel that vLLM's Gemma 4 calls on a GPU."""
    interpreted.require()
    from vllm.model_executor.models import gemma4 as model

    if not hasattr(model, "gemma4_fused_routing_kernel_triton"):
        raise Unsupported("vLLM: this release's Gemma 4 routes by torch on a GPU, too")
    # A GPU's projection puts out float32, too.
    logits = inputs.logits.float()
    scale = inputs.tensors["router.per_expert_scale"]
    with interpreted.library():
        weights, ids = model.gemma4_fused_routing_kernel_triton(logits, inputs.routing.top_k, scale)
    return Routing(ids, weights)


def _inkling() -> Any:
    try:
        return import_module("vllm.models.inkling.nvidia.moe")
    except ImportError:
        return None


def _by_inkling(inputs: RouteInputs) -> Routing:
    """The gate kernel of vLLM's Inkling, which routes and weighs in one."""
    spec, module = inputs.routing, _inkling()
    want = RoutingSpec(
        spec.top_k, score="sigmoid", selection_bias=spec.selection_bias, scale=spec.scale,
        global_scale=spec.global_scale, shared_classes=spec.shared_classes,
    )  # fmt: skip
    if module is None or spec != want:
        raise Unsupported(f"route: no model of vLLM's routes by {spec}")
    interpreted.require()
    classes = inputs.logits.shape[-1]
    gate = SimpleNamespace(
        n_total_experts=classes, n_routed_experts=classes - spec.shared_classes, topk=spec.top_k,
        n_shared_experts=spec.shared_classes, bias=inputs.tensors.get("router.selection_bias"), route_scale=spec.scale,
        global_scale=inputs.tensors.get("router.global_scale"),
    )  # fmt: skip
    with interpreted.library(), refusals():
        weights, ids = module.InklingGate.select_experts(gate, inputs.logits.float())
    slots = inputs.slots
    return Routing(ids[:, :slots], weights[:, :slots])
