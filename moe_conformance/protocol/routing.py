"""Routing: logits to experts and weights, by itself (`route`) and as a module with parameters (`router_module`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from moe_conformance.model.specs import LogitsSpec, RoutingSpec, Shape, router_tensors
from moe_conformance.protocol.gone import HadOtherFields

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Routing(NamedTuple):
    """ids: [T, K] integer, in any order within a row, -1 where a pair has no expert.

    weights: [T, K], weights[t, k] belongs to ids[t, k]. float32; or the logits' dtype where RoutingSpec.score_dtype is
    "input", for an engine that hands them on so. An adapter converts what its engine gives in another dtype.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class FusedShared:
    """Shared experts that an engine computes as further routed ones, each token's last slots.

    count: slots K to K + count - 1 have the ids N to N + count - 1 in any order, N = E and the identity experts.
    rule: of their weights. "constant": each is `weight`; an engine that multiplies the sum of all slots by a scaling
    factor s afterwards has 1 / s here. "share": each is `weight` times the sum of the row's routed weights, which is
    the same where those are normalised to 1. "router": what RoutingSpec.shared_classes gives them.
    """

    count: int
    rule: Literal["constant", "share", "router"] = "constant"
    weight: float = 1.0


@dataclass(frozen=True)
class RouteInputs(HadOtherFields):
    """Router logits, and how they become ids and weights.

    logits: [T, classes] float32, bfloat16 or float16; classes as `LayerSpec.classes` counts them.
    routing: the method. tensors: those that it needs, as `LayerSpec.tensors` names and shapes them
    (router.selection_bias, router.per_expert_scale, router.global_scale, router.table).
    token_ids: [T] int64, for a table. sequences: how many of equal length the T tokens are, for a capacity.
    valid_rows: the first so many rows are tokens, those behind are padding; None: all are. The router may give a
    padding row any ids and weights, or -1; it must not let one change a valid row.
    fused_shared: shared experts that are slots of the answer.
    """

    gone: ClassVar[Mapping[str, str]] = {
        "method": "routing",
        "top_k": "routing.top_k",
        "per_expert_scale": "tensors['router.per_expert_scale']",
    }
    logits: Tensor
    routing: RoutingSpec
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    token_ids: Tensor | None = None
    sequences: int = 1
    valid_rows: int | None = None
    fused_shared: FusedShared | None = None

    @property
    def slots(self) -> int:
        """Columns of the answer: K, and one for each fused shared expert."""
        return self.routing.top_k + (self.fused_shared.count if self.fused_shared else 0)


@dataclass(frozen=True)
class RouterSpec(HadOtherFields):
    """The router to build: from hidden states [T, H] to ids and weights.

    num_experts: those with weights. dtype: of its parameters. vocab_size: rows of the table of a "table" selector.
    """

    gone: ClassVar[Mapping[str, str]] = {
        "method": "routing",
        "top_k": "routing.top_k",
        "norm_eps": "logits.norm_eps",
    }
    logits: LogitsSpec
    routing: RoutingSpec
    num_experts: int
    hidden_size: int
    dtype: torch.dtype
    vocab_size: int = 0

    def tensors(self) -> dict[str, Shape]:
        """Canonical name -> shape of every tensor of the router."""
        return router_tensors(self.logits, self.routing, self.hidden_size, self.num_experts, self.vocab_size)


@dataclass(frozen=True)
class RouterHandle:
    """A router as the engine has it.

    module: an nn.Module; `module(x)` returns (weights [T, K], ids [T, K]).
    takes: whether x is router logits [T, classes] or hidden states [T, H].
    tensors: canonical name, as `RouterSpec.tensors` gives it, -> name in `module.named_parameters()` or
    `module.named_buffers()`; a router that takes logits has no router.proj.
    """

    module: nn.Module
    takes: Literal["logits", "hidden"]
    tensors: Mapping[str, str]
