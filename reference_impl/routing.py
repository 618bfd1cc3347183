"""Routing: from router logits to the experts of each token and their weights.

Arithmetic is float32, or float64 where the logits are float64, as every model here computes its scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.errors import InputError
from moe_conformance.inputs import poison_


def top_experts(scores: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest scores of each row, largest first, ties to the lowest id.

    scores: [T, E] float. A NaN counts as larger than any number, so ids stay unique and in range for any row.
    returns [T, K] int64. Raises InputError for top_k outside [1, E].

    >>> top_experts(torch.tensor([[0.1, 0.5, 0.5, 0.2]]), 2)
    tensor([[1, 2]])
    """
    experts = scores.shape[-1]
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k: got {top_k}, want 1 to {experts}, the number of experts in the logits")
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def softmax_topk(logits: Tensor, top_k: int, renormalize: bool) -> Routing:
    """Softmax over all experts, then the top_k; with renormalize their weights sum to 1.

    logits: [T, E] float. returns ids [T, K] int64, weights [T, K] float32 (float64 for float64 logits).
    Source: Qwen2-MoE, OLMoE (renormalize from norm_topk_prob), Mixtral (always renormalises).
    """
    scores = logits.softmax(dim=-1, dtype=_compute_dtype(logits))  # [T, E]
    ids = top_experts(scores, top_k)
    weights = scores.gather(-1, ids)  # [T, K]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(ids, weights)


def gemma4(logits: Tensor, top_k: int, per_expert_scale: Tensor) -> Routing:
    """Softmax over all experts, top_k, renormalise, then multiply each weight by its expert's own scale.

    logits: [T, E] float; per_expert_scale: [E] float. returns as softmax_topk; weights need not sum to 1.
    Source: Gemma 4 (transformers Gemma4TextRouter, vLLM Gemma4MoE).
    """
    if per_expert_scale.shape != logits.shape[-1:]:
        raise InputError(
            f"per_expert_scale: got shape {list(per_expert_scale.shape)}, want [{logits.shape[-1]}], one an expert"
        )
    ids, weights = softmax_topk(logits, top_k, renormalize=True)
    return Routing(ids, weights * per_expert_scale[ids].to(weights.dtype))


def route(inputs: RouteInputs) -> Routing:
    """Route by the named method. Raises InputError for logits that are not [T, E], or a scale that is not there."""
    if inputs.logits.ndim != 2:
        raise InputError(f"logits: got shape {list(inputs.logits.shape)}, want [T, E]; flatten the batch first")
    if inputs.method == "gemma4":
        if inputs.per_expert_scale is None:
            raise InputError("per_expert_scale: got None, want [E]; the gemma4 method has one")
        return gemma4(inputs.logits, inputs.top_k, inputs.per_expert_scale)
    return softmax_topk(inputs.logits, inputs.top_k, renormalize=inputs.method == "softmax_topk_renorm")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class FusedExperts(nn.Module):
    """Stands for a fused expert layer that is handed its routing function and calls it."""

    def __init__(self, routing_function: Callable[[Tensor], Routing]) -> None:
        super().__init__()
        self.routing_function = routing_function

    def forward(self, logits: Tensor) -> Routing:
        return self.routing_function(logits)


class Router(nn.Module):
    """A router as engines build it: the expert layer owns a function that reaches back for the router's parameters.

    That function is a bound method, which reads `self.per_expert_scale` when it is called. A local function that
    names the Parameter, or even `self`, would keep the old object through functional_call, replacement or deepcopy.

    forward(hidden [T, H]) returns (weights [T, K], ids [T, K]). For gemma4, logits are
    proj(rms_norm(hidden) * scale / sqrt(H)); otherwise proj(hidden). Parameters are poisoned until loaded.
    """

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = _unloaded(spec.num_experts, spec.hidden_size, dtype=spec.dtype)
        if spec.method == "gemma4":
            self.scale = _unloaded(spec.hidden_size, dtype=spec.dtype)
            self.per_expert_scale = _unloaded(spec.num_experts, dtype=spec.dtype)
        self.experts = FusedExperts(self.select)

    def select(self, logits: Tensor) -> Routing:
        scale = self.per_expert_scale if self.spec.method == "gemma4" else None
        return route(RouteInputs(logits, self.spec.top_k, self.spec.method, scale))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.method == "gemma4":
            hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=self.spec.norm_eps)
            hidden = hidden * self.scale * hidden.shape[-1] ** -0.5
        ids, weights = self.experts(nn.functional.linear(hidden, self.proj))
        return weights, ids


def _unloaded(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(poison_(torch.empty(shape, dtype=dtype)), requires_grad=False)


def build_router(spec: RouterSpec) -> RouterHandle:
    """The router of `spec` with its tensors by canonical name."""
    module = Router(spec)
    return RouterHandle(module, "hidden", {name: name for name, _ in module.named_parameters()})
