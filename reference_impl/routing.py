"""Routing: from router logits to the experts of each token and their weights.

`route_logits` covers every router of transformers 5.23; all act in this order: condition the logits, score them,
choose, weigh, normalise, scale. What differs between models is in the RoutingSpec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import FusedShared, RouteInputs, Routing
from moe_conformance.errors import InputError
from moe_conformance.model.specs import Precision, RoutingSpec
from moe_conformance.reference_impl.capacity import over_capacity


class Routed(NamedTuple):
    """ids: [T, K] int64. weights: [T, K] in the dtype of the scores. shared: [T, n], of n weighted shared experts."""

    ids: Tensor
    weights: Tensor
    shared: Tensor | None


def route_logits(
    logits: Tensor,
    spec: RoutingSpec,
    tensors: Mapping[str, Tensor],
    *,
    token_ids: Tensor | None = None,
    sequences: int = 1,
) -> Routed:
    """Choose and weigh the experts of each token.

    logits: [T, classes] float. tensors: by the names of `LayerSpec.tensors`; only those that spec asks for are read.
    token_ids: T integers in any shape, for a table. sequences: how many equally long ones the T tokens are, in order.
    returns ids, unique and in range even for rows with ties, NaN or inf; ties break to the lowest id; NaN sorts
    highest. Ids of identity experts are kept; a skipped pair has id -1 and weight 0, a pair over capacity has weight 0.
    Raises InputError for a tensor that is missing or does not fit logits or spec.

    >>> route_logits(torch.tensor([[0.0, 4.0, 4.0, 2.0]]), RoutingSpec(2, score="sigmoid", renormalize="sum"), {})[:2]
    (tensor([[1, 2]]), tensor([[0.5000, 0.5000]]))
    """
    if logits.ndim != 2:
        raise InputError(f"logits: got shape {list(logits.shape)}, want [T, E]; flatten the batch first")
    logits = in_precision(logits, spec.score_dtype) * spec.logit_scale
    if spec.logit_softcap:
        logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
    if spec.selector == "product_keys":
        logits = sums_of_halves(logits)
    classes = logits.shape[1] - spec.shared_classes
    logits, shared_logits = logits[:, :classes], logits[:, classes:]

    scores = logits if spec.select_on == "logits" else score(logits, spec)  # [T, classes]
    if spec.selector == "table":
        ids = ids_of_tokens(named(tensors, "router.table", None, spec.top_k), token_ids, len(logits))
    else:
        compared = scores + named(tensors, "router.selection_bias", classes) if spec.selection_bias else scores
        ids = top_experts(best_groups(compared, spec), spec.top_k)

    if spec.selector == "sparsemixer":
        weights = sparsemixer(logits, ids, spec.jitter)
    elif spec.shared_classes:
        # Sigmoid scores over their sum, in logarithms: very negative logits still get a weight although their score
        # underflows to 0.
        chosen = torch.cat([logits.gather(1, ids), shared_logits], dim=1)  # [T, K + n]
        weights = F.logsigmoid(chosen).softmax(dim=1)
    else:
        weights = scores.gather(1, ids)  # [T, K]
        if spec.select_on == "logits":
            weights = score(weights, spec)

    weights = normalised(weights, ids, spec, classes, sequences) * spec.scale
    if spec.global_scale:
        weights = weights * named(tensors, "router.global_scale", 1).to(weights.dtype)
    weights, shared = weights[:, : spec.top_k], weights[:, spec.top_k :]
    if spec.per_expert_scale:
        weights = weights * named(tensors, "router.per_expert_scale", classes)[ids].to(weights.dtype)
    if spec.skip_expert:
        skipped = ids == classes - 1
        ids, weights = ids.masked_fill(skipped, -1), weights.masked_fill(skipped, 0.0)
    return Routed(ids, weights, shared if spec.shared_classes else None)


def top_experts(scores: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest scores of each row, largest first, ties to the lowest id.

    scores: [T, E] float. NaN sorts highest, so ids are unique and in range for any row.
    returns [T, K] int64. Raises InputError for top_k outside [1, E].

    >>> top_experts(torch.tensor([[0.1, 0.5, 0.5, 0.2]]), 2)
    tensor([[1, 2]])
    """
    experts = scores.shape[1]
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k: got {top_k}, want 1 to {experts}, the number that is chosen from")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def score(logits: Tensor, spec: RoutingSpec) -> Tensor:
    """The score of each logit of a row, by spec.score."""
    match spec.score:
        case "softmax":
            return logits.softmax(dim=1)
        case "sigmoid":
            return logits.sigmoid()
        case "sqrt_softplus":
            return F.softplus(logits).sqrt()


def best_groups(compared: Tensor, spec: RoutingSpec) -> Tensor:
    """compared [T, E], with spec.group_mask for experts outside the best groups (of E / groups experts each).

    Sources: group_limited_greedy of DeepSeek-V2 ("max", masked with 0), noaux_tc of DeepSeek-V3 ("top2_sum", -inf).
    """
    if compared.shape[1] % spec.groups:
        raise InputError(f"logits: got {compared.shape[1]} classes, want a multiple of the {spec.groups} groups")
    groups: Tensor = compared.unflatten(1, (spec.groups, -1))  # [T, G, E / G]
    many = {"max": 1, "top2_sum": 2}[spec.group_score]
    best = groups.sort(dim=2, descending=True).values[..., :many]
    chosen = top_experts(best.sum(dim=2), spec.top_groups)  # [T, top_groups]
    dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, chosen, False)  # [T, G]
    return groups.masked_fill(dropped.unsqueeze(-1), spec.group_mask).flatten(1)


def sums_of_halves(logits: Tensor) -> Tensor:
    """[T, n * n], the sum of logit i of one half and j of the other at i * n + j, for logits [T, 2 n].

    Doge reads its logits as [2, T, n]. So with several tokens the halves of token t belong to other tokens: they are
    rows t and T + t of the 2 T rows of n logits. Only a single token has its own two halves.
    Source: product keys, Lample et al. 2019; transformers DogeCDMoE.
    """
    tokens, columns = logits.shape
    if columns % 2:
        raise InputError(f"logits: got {columns} columns, want an even number, twice the square root of E")
    first, second = logits.reshape(2, tokens, columns // 2).unbind()  # [T, n]
    return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)


def ids_of_tokens(table: Tensor, token_ids: Tensor | None, tokens: int) -> Tensor:
    """Rows of table [V, K] by token id, as int64 [T, K]. Source: the hash layers of DeepSeek-V4."""
    if token_ids is None or token_ids.numel() != tokens:
        got = "None" if token_ids is None else f"{token_ids.numel()} of them"
        raise InputError(f"token_ids: got {got}, want {tokens}, one a row of logits; a table chooses by token id")
    if ((token_ids < 0) | (token_ids >= len(table))).any():
        got = f"{int(token_ids.min())} to {int(token_ids.max())}"
        raise InputError(f"token_ids: got {got}, want 0 to {len(table) - 1}, the rows of router.table")
    return table[token_ids.reshape(-1)].long()


def sparsemixer(logits: Tensor, ids: Tensor, jitter: float) -> Tensor:
    """Weights [T, K] of PhiMoE: softmax of each chosen logit among those near it that were not chosen before it.

    A logit l is near the chosen m where (m - l) / max(|l|, m) <= 2 jitter. logits: [T, E]; ids: [T, K], best first.
    Source: SparseMixer-v2 in evaluation, Liu et al. 2024; transformers PhimoeTopKRouter.
    """
    weights = []
    for chosen in ids.split(1, dim=1):  # [T, 1]
        best = logits.gather(1, chosen)
        far = (best - logits) / logits.abs().maximum(best) > 2 * jitter
        weights.append(logits.masked_fill(far, -math.inf).softmax(dim=1).gather(1, chosen))
        logits = logits.scatter(1, chosen, -math.inf)
    return torch.cat(weights, dim=1)


def normalised(weights: Tensor, ids: Tensor, spec: RoutingSpec, classes: int, sequences: int) -> Tensor:
    """Weights [T, K] normalised; 0 for tokens over the capacity of their expert."""
    dropped = torch.zeros_like(weights, dtype=torch.bool)
    if spec.capacity is not None:
        dropped = over_capacity(ids, weights[:, 0], spec.capacity, classes, sequences)
        if not spec.capacity.renormalize_before:
            weights = weights.masked_fill(dropped, 0.0)
    match spec.renormalize:
        case "sum":
            weights = weights / (weights.sum(dim=1, keepdim=True) + spec.epsilon).clamp(min=spec.floor)
        case "norm":
            weights = weights / weights.norm(p=spec.norm_order, dim=1, keepdim=True)
    return weights.masked_fill(dropped, 0.0)


def in_precision(tensor: Tensor, precision: Precision) -> Tensor:
    """The tensor in float32 if precision says so; float64 stays float64."""
    return tensor.float() if precision == "float32" and tensor.dtype != torch.float64 else tensor


def named(tensors: Mapping[str, Tensor], name: str, *shape: int | None) -> Tensor:
    """tensors[name] of that shape, None for any size. Raises InputError where it is missing or of another shape."""
    want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if name not in tensors:
        raise InputError(f"{name}: got no such tensor, want {want}; the spec needs it")
    got = tensors[name].shape
    if len(got) != len(shape) or any(size not in (None, there) for size, there in zip(shape, got, strict=True)):
        raise InputError(f"{name}: got shape {list(got)}, want {want}")
    return tensors[name]


def route(inputs: RouteInputs) -> Routing:
    """Ids and weights [T, slots] of router logits; see RouteInputs for shapes.

    Rows after the valid ones get -1 and weight 0. They are cut off before anything is computed, so valid rows have the
    same bits as without them. Raises InputError as `route_logits` does, and for valid_rows outside [0, T].
    """
    tokens = len(inputs.logits)
    valid = tokens if inputs.valid_rows is None else inputs.valid_rows
    if not 0 <= valid <= tokens:
        raise InputError(f"valid_rows: got {valid}, want 0 to {tokens}, the rows of logits")
    token_ids = None if inputs.token_ids is None else inputs.token_ids.reshape(-1)[:valid]
    routed = route_logits(
        inputs.logits[:valid], inputs.routing, inputs.tensors, token_ids=token_ids, sequences=inputs.sequences
    )
    ids, weights = routed.ids, routed.weights
    if inputs.fused_shared is not None:
        first = chosen_from(inputs.routing, inputs.logits.shape[1]) - inputs.routing.skip_expert
        ids, weights = with_fused_shared(routed, inputs.fused_shared, first)
    behind = (0, 0, 0, tokens - valid)
    return Routing(F.pad(ids, behind, value=-1), F.pad(weights, behind))


def chosen_from(spec: RoutingSpec, columns: int) -> int:
    """How many classes the router chooses among, given the number of logit columns."""
    return (columns // 2) ** 2 if spec.selector == "product_keys" else columns - spec.shared_classes


def with_fused_shared(routed: Routed, fused: FusedShared, first: int) -> Routing:
    """Appends a slot for each shared expert, with ids from `first` on, weighed by the rule.

    Raises InputError if the router's own weights are asked for and their number differs.
    """
    match fused.rule:
        case "constant":
            share = routed.weights.new_full((len(routed.weights), fused.count), fused.weight)
        case "share":
            share = (routed.weights.sum(dim=1, keepdim=True) * fused.weight).expand(-1, fused.count)
        case "router":
            there = 0 if routed.shared is None else routed.shared.shape[1]
            if routed.shared is None or there != fused.count:
                raise InputError(
                    f"fused_shared.count: got {fused.count} by rule 'router', want {there}, "
                    "which is RoutingSpec.shared_classes; take another rule where the router weighs no shared expert"
                )
            share = routed.shared
    ids = torch.arange(first, first + fused.count, device=routed.ids.device).expand(len(routed.ids), -1)
    return Routing(torch.cat([routed.ids, ids], dim=1), torch.cat([routed.weights, share], dim=1))
