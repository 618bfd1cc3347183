"""Routing: from router logits to the experts of each token and their weights. Twin of reference_impl/routing.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_conformance.engine import FusedShared, RouteInputs, Routing, RoutingSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.kernels.routing_kernel import empty_routing, launch_route
from moe_conformance.reference_impl.operators import arguments, keywords, operator
from moe_conformance.reference_impl.routing import Routed, ids_of_tokens, named

# One program holds all classes of its tokens in registers: 64-bit sort keys, 32 a thread at 4 warps and 4 tokens.
MAX_CLASSES = 1024
# The output tile is [BLOCK_T, BLOCK_K]; no public model chooses more than 22 (Nemotron-3-Super).
MAX_SLOTS = 32

# Not supported: capacity looks beyond one row.
_WITHOUT = ("capacity",)


def _launch(
    logits: Tensor,
    bias: Tensor | None,
    own_scale: Tensor | None,
    common_scale: Tensor | None,
    given: Tensor | None,
    valid_rows: int,
    count: int,
    rule: Any,
    weight: float,
    **values: Any,
) -> tuple[Tensor, Tensor]:
    fused, spec = FusedShared(count, rule, weight), RoutingSpec(**values)
    return launch_route(logits, bias, own_scale, common_scale, given, valid_rows, spec, fused)


def _fake(
    logits: Tensor,
    bias: Tensor | None,
    own_scale: Tensor | None,
    common_scale: Tensor | None,
    given: Tensor | None,
    valid_rows: int,
    count: int,
    rule: Any,
    weight: float,
    **values: Any,
) -> tuple[Tensor, Tensor]:
    return empty_routing(logits, RoutingSpec(**values), FusedShared(count, rule, weight))


_route = operator(
    "route(Tensor logits, Tensor? bias, Tensor? own_scale, Tensor? common_scale, Tensor? given, SymInt valid_rows, "
    f"int fused_count, str fused_rule, float fused_weight, {arguments(RoutingSpec, _WITHOUT)}) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def route_logits(
    logits: Tensor,
    spec: RoutingSpec,
    tensors: Mapping[str, Tensor],
    *,
    token_ids: Tensor | None = None,
    sequences: int = 1,
) -> Routed:
    """Choose and weigh the experts of each token.

    logits: [T, classes] float of any strides. Steps are computed in float32, and kept in the logits' dtype where
    spec.score_dtype is "input".
    tensors: router.selection_bias, .per_expert_scale, .global_scale, .table, where the spec asks for them.
    token_ids: T integers in any shape, for a table. sequences: as in the reference, where they matter for capacity.
    returns ids [T, K] int32, largest first, unique and in range for any row, ties to the lowest id, NaN highest;
    weights [T, K] float32; shared [T, n] float32.
    Raises Unsupported for a method that looks beyond one row (capacity, product keys) and for more than a program
    holds; InputError for a tensor that is missing or does not fit, and for K > E.
    """
    ids, weights = _routed(logits, spec, tensors, token_ids, len(logits), FusedShared(0))
    return Routed(ids, weights[:, : spec.top_k], weights[:, spec.top_k :] if spec.shared_classes else None)


def route(inputs: RouteInputs) -> Routing:
    """Ids and weights [T, inputs.slots] of `RouteInputs`; a padding row has ids of -1 and weights of 0.

    Otherwise as `route_logits`. Also raises InputError if the router's weights of shared experts are asked for and
    their number differs.
    """
    fused, spec = inputs.fused_shared or FusedShared(0), inputs.routing
    if fused.rule == "router" and fused.count != spec.shared_classes:
        raise InputError(
            f"fused_shared.count: got {fused.count} by rule 'router', want {spec.shared_classes}, "
            "which is RoutingSpec.shared_classes; take another rule where the router weighs no shared expert"
        )
    tokens = len(inputs.logits)
    valid = tokens if inputs.valid_rows is None else inputs.valid_rows
    if not 0 <= valid <= tokens:
        raise InputError(f"valid_rows: got {valid}, want 0 to {tokens}, the rows of logits")
    ids, weights = _routed(inputs.logits, spec, inputs.tensors, inputs.token_ids, valid, fused)
    return Routing(ids, weights[:, : inputs.slots])


def _routed(
    logits: Tensor,
    spec: RoutingSpec,
    tensors: Mapping[str, Tensor],
    token_ids: Tensor | None,
    valid_rows: int,
    fused: FusedShared,
) -> tuple[Tensor, Tensor]:
    _check(logits, spec, fused)
    classes = logits.shape[1] - spec.shared_classes
    bias = named(tensors, "router.selection_bias", classes) if spec.selection_bias else None
    own = named(tensors, "router.per_expert_scale", classes) if spec.per_expert_scale else None
    common = named(tensors, "router.global_scale", 1) if spec.global_scale else None
    given = None
    if spec.selector == "table":
        # Padding has no token.
        own_ids = token_ids if token_ids is None else token_ids.flatten()[:valid_rows]
        given = ids_of_tokens(named(tensors, "router.table", None, spec.top_k), own_ids, valid_rows).contiguous()
    slots = (fused.count, fused.rule, fused.weight)
    ids, weights = _route(logits, bias, own, common, given, valid_rows, *slots, **keywords(spec, _WITHOUT))
    return ids, weights


def _check(logits: Tensor, spec: RoutingSpec, fused: FusedShared) -> None:
    if logits.ndim != 2:
        raise InputError(f"logits: got shape {list(logits.shape)}, want [T, E]; flatten the batch first")
    if not logits.is_floating_point():
        raise InputError(f"logits: got {logits.dtype}, want a float dtype")
    if spec.capacity or spec.selector == "product_keys":
        what = "capacity" if spec.capacity else "product_keys"
        raise Unsupported(f"routing: got {what}, want none: a program sees its own rows alone; use the reference")
    if spec.renormalize == "norm" and spec.norm_order not in (1.0, 2.0):
        raise Unsupported(f"norm_order: got {spec.norm_order}, want 1 or 2")
    classes = logits.shape[1] - spec.shared_classes
    if classes > MAX_CLASSES:
        raise Unsupported(f"logits: got {classes} experts, want at most {MAX_CLASSES}, which one program holds")
    if not 1 <= spec.top_k <= classes:
        raise InputError(f"top_k: got {spec.top_k}, want 1 to {classes}, the number of experts in the logits")
    slots = spec.top_k + max(spec.shared_classes, fused.count)
    if slots > MAX_SLOTS:
        raise Unsupported(f"top_k: got {slots} slots a token, want at most {MAX_SLOTS}, which one program holds")
    if classes % spec.groups:
        raise InputError(f"logits: got {classes} experts, want a multiple of the {spec.groups} groups")
    if not 1 <= spec.top_groups <= spec.groups:
        raise InputError(f"top_groups: got {spec.top_groups}, want 1 to {spec.groups}, the number of groups")
