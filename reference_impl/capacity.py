"""Capacity: an expert takes a limited number of tokens; later ones are dropped."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.model.specs import Capacity


def over_capacity(ids: Tensor, importance: Tensor, capacity: Capacity, experts: int, sequences: int) -> Tensor:
    """Which (token, expert) pairs arrive when their expert is full: [T, K] bool.

    All first choices queue up before any second choice; within a choice tokens come in order, or by importance, the
    largest first. A pair that is dropped keeps its place in the queue.
    ids: [T, K] int64. importance: [T], the score of each token's first choice. sequences: how many equally long ones
    the tokens are. Raises InputError where they do not divide T.
    Source: Switch Transformers, Fedus et al. 2021 (top-1, per sequence); transformers NllbMoeTop2Router.
    """
    tokens, top_k = ids.shape
    rivals = {"sequence": sequences, "batch": 1}[capacity.per]
    if tokens % rivals:
        raise InputError(f"sequences: got {sequences} for {tokens} tokens, want equally long sequences")
    length = tokens // rivals
    places = capacity.tokens
    if capacity.fraction > 0:
        places = math.ceil(capacity.fraction * length)
    elif places is None:
        places = 2 * math.ceil(length / experts)

    ids = ids.reshape(rivals, length, top_k)
    importance = importance.reshape(rivals, length)
    if not capacity.by_weight:
        importance = importance.new_zeros(importance.shape)
    order = importance.sort(dim=1, descending=True, stable=True).indices  # [R, T / R]
    order = order.unsqueeze(-1).expand_as(ids)
    queue = ids.gather(1, order).transpose(1, 2).flatten(1)  # [R, K * T / R], all first choices, then all second
    arrival = F.one_hot(queue, experts).cumsum(dim=1).gather(-1, queue.unsqueeze(-1))  # 1 for the first of its expert
    full = (arrival > places).reshape(rivals, top_k, length).transpose(1, 2)  # [R, T / R, K]
    return full.new_zeros(full.shape).scatter(1, order, full).flatten(0, 1)
