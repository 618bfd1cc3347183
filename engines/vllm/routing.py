"""vLLM's routers on a CPU, given logits: Gemma 4's routing function, and what its expert layers for a CPU route by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from moe_conformance.engine import RouteInputs, Routing, RoutingSpec
from moe_conformance.engines.vllm import closure
from moe_conformance.errors import Unsupported

# Where select_experts lives: plain torch, newest place first.
_PLACES = ("router.cpu_router", "cpu_fused_moe", "experts.cpu_moe")


def select_experts() -> Callable[..., Any] | None:
    """vLLM's select_experts for a CPU, or None where the release has none that can be imported."""
    for place in _PLACES:
        try:
            found = import_module(f"vllm.model_executor.layers.fused_moe.{place}")
        except ImportError:
            continue
        if hasattr(found, "select_experts"):
            function: Callable[..., Any] = found.select_experts
            return function
    return None


def features() -> frozenset[str]:
    import vllm.model_executor.models.gemma4  # noqa: F401

    offered = {"softmax", "renormalize", "per_expert_scale", "padding_rows"}
    if select_experts() is not None:
        offered |= {"not_renormalized", "score_of_chosen", "input_precision"}
        offered |= {"sigmoid", "selection_bias", "groups", "group_top2", "routed_scale"}
    return frozenset(offered)


def route(inputs: RouteInputs) -> Routing:
    """The router that vLLM takes for a model of this method on a CPU."""
    spec = inputs.routing
    if closure.is_gemma4(spec):
        return closure.route(inputs)
    function, chosen = select_experts(), _arguments(spec)
    if function is None or chosen is None:
        raise Unsupported(f"route: {spec}; no router of vLLM's computes that on a CPU")
    bias = inputs.tensors.get("router.selection_bias")
    if bias is not None:
        chosen["e_score_correction_bias"] = bias
    hidden = inputs.logits.new_zeros(len(inputs.logits), 1)
    weights, ids = function(hidden_states=hidden, router_logits=inputs.logits, top_k=spec.top_k, **chosen)
    return Routing(ids, weights)


def _arguments(spec: RoutingSpec) -> dict[str, Any] | None:
    """What vLLM's models of this method pass on; None where vLLM has no words for it.

    Not passed on, and so for the cases to find: the dtype of scores, and the 1e-20 that DeepSeek adds to a sum.
    """
    if spec.renormalize == "norm" or spec.epsilon > 1e-20:
        return None
    chosen = RoutingSpec(spec.top_k, select_on="logits", score_dtype=spec.score_dtype)
    plain = RoutingSpec(spec.top_k, renormalize=spec.renormalize, epsilon=spec.epsilon)
    if spec in (chosen, plain):
        return {"use_grouped_topk": False, "renormalize": spec == chosen or spec.renormalize == "sum"}
    # Models without groups pass on one. With a bias the two best of a group are added up, without one the best counts.
    grouped = replace(
        plain,
        score=spec.score,
        selection_bias=spec.selection_bias,
        groups=spec.groups,
        top_groups=spec.top_groups,
        group_score="top2_sum" if spec.selection_bias and spec.groups > 1 else "max",
        scale=spec.scale,
    )
    if spec.score == "sqrt_softplus" or (spec if spec.groups > 1 else replace(spec, group_score="max")) != grouped:
        return None
    return {
        "use_grouped_topk": True,
        "renormalize": spec.renormalize == "sum",
        "num_expert_group": spec.groups,
        "topk_group": spec.top_groups,
        "scoring_func": spec.score,
        "routed_scaling_factor": spec.scale,
    }
