"""Which pairs fit into the capacity of their expert, as far as rounding leaves that certain.

Written independently of reference_impl. Pairs queue up at their experts: all first choices, then all second ones;
within a choice tokens come in order, or by the score of their first choice. A pair that is dropped keeps its place in
the queue.
Sources: Switch Transformers, NLLB-MoE.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_conformance.model.specs import Capacity


class Interval(NamedTuple):
    """The range of a number within its rounding errors, from low to high."""

    low: Tensor
    high: Tensor


class Room(NamedTuple):
    """[T, E] bool each: whether an expert may have a place for a token, and whether it may have none."""

    keeps: Tensor
    drops: Tensor


def places(capacity: Capacity, tokens: int, experts: int) -> int:
    """How many of `tokens` tokens one expert takes."""
    if capacity.fraction > 0:
        return math.ceil(capacity.fraction * tokens)
    return 2 * math.ceil(tokens / experts) if capacity.tokens is None else capacity.tokens


def room(compared: Interval, first: Interval, capacity: Capacity, sequences: int, top_k: int) -> Room:
    """compared: [T, E], what top-k compares. first: [T], the score of each token's first choice."""
    tokens, experts = compared.low.shape
    rivals = sequences if capacity.per == "sequence" else 1
    if tokens % rivals:
        raise ValueError(f"sequences: got {sequences} for {tokens} tokens, want equally long ones")
    length = tokens // rivals
    possible, surely = choices(compared, top_k)  # [T, E, K]
    possible, surely = (mask.unflatten(0, (rivals, length)).double() for mask in (possible, surely))

    row = torch.arange(length)
    before = row[:, None] < row  # [L, L], the first index comes before the second
    may_precede = does_precede = before.expand(rivals, length, length)
    if capacity.by_weight:
        low, high = (score.unflatten(0, (rivals, length)) for score in first)
        does_precede = low[:, :, None] > high[:, None, :]
        may_precede = (high[:, :, None] >= low[:, None, :]) & (row[:, None] != row)

    def queue(pairs: Tensor, precede: Tensor) -> Tensor:
        """How many pairs stand before each, [R, L, E, K]."""
        earlier = pairs.sum(1, keepdim=True) - pairs  # of other tokens
        earlier = earlier.cumsum(3) - earlier  # by an earlier choice
        return earlier + torch.einsum("rst,rsek->rtek", precede.double(), pairs)

    full = places(capacity, length, experts)
    keeps = (possible > 0) & (queue(surely, does_precede) < full)
    drops = (possible > 0) & (queue(possible, may_precede) >= full)
    return Room(keeps.any(3).flatten(0, 1), drops.any(3).flatten(0, 1))


def choices(compared: Interval, top_k: int) -> tuple[Tensor, Tensor]:
    """Whether each expert may be the token's k-th choice, and whether it surely is: [T, E, K] bool both."""
    low, high = compared
    above = (low[:, None, :] > high[:, :, None]).sum(2)  # certainly before it, [T, E]
    near = (high[:, None, :] >= low[:, :, None]).sum(2) - 1  # possibly before it, itself excluded
    place = torch.arange(top_k)
    possible = (above[..., None] <= place) & (place <= near[..., None])
    return possible, possible & (above == near)[..., None]


def fitting(picked: Tensor, compared: Interval, found: Room, top_k: int) -> Tensor:
    """[T] bool: whether the picked experts, [T, E] bool, may be those of a best K that have a place.

    That is so if some best K contains all of them, and otherwise only experts that may have no place. A threshold w is
    fixed, which no expert outside the K exceeds and none inside is below; w is tried at every score.
    """
    low, high = compared
    levels = torch.cat([low, torch.full_like(low[:, :1], -torch.inf)], dim=1)[:, :, None]  # [T, E + 1, 1]
    forced, allowed = low[:, None] > levels, high[:, None] >= levels  # [T, E + 1, E]
    chosen, lost = picked[:, None], found.drops[:, None]
    fits = (allowed | ~chosen).all(2) & (chosen | lost | ~forced).all(2)
    fits &= ((forced | chosen).sum(2) <= top_k) & ((chosen | (allowed & lost)).sum(2) >= top_k)
    return fits.any(1) & (found.keeps | ~picked).all(1)
