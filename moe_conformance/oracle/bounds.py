"""Largest errors that a correct engine may make: derived from dtype and operation count, not tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_conformance.oracle.precision import LAMBDA, unit_roundoff

# How much larger than a same-dtype path's the root mean square of the errors may be. One rounding of the output more
# than the path makes 1.26 (measured: the sum over experts kept in the dtype), an accumulator in the dtype 2.3.
ROUGHER = 1.5


@dataclass(frozen=True)
class Bound:
    """limit: largest allowed absolute error, element by element, float64. origin: how it was derived, for messages."""

    limit: Tensor
    origin: str


def twice(bound: Bound) -> Bound:
    """How far two results may be apart, each of which may be so far from the exact one."""
    return Bound(2 * bound.limit, f"twice: {bound.origin}")


def relative(want: Tensor, roundings: float, dtype: torch.dtype, why: str) -> Bound:
    """Deterministic bound gamma_n |want| for values that n roundings in `dtype` lead to.

    Underflow to the smallest normal number of the dtype is allowed on top.
    """
    u = unit_roundoff(dtype)
    gamma = roundings * u / (1 - roundings * u)
    limit = want.abs().double() * gamma + torch.finfo(dtype).tiny
    return Bound(limit, f"{roundings:g} roundings of {dtype} ({why}), gamma_n = {gamma:.2e}, relative")


def sums(
    magnitude: Tensor,
    terms: int,
    compute: torch.dtype,
    why: str,
    stored: Tensor | float = 0.0,
    store: torch.dtype | None = None,
) -> Bound:
    """Probabilistic bound for sums of `terms` products accumulated in `compute`.

    magnitude: the same sums with every product replaced by its absolute value. stored: magnitude that is further
    rounded to `store` (the tensors that a path keeps in a narrow dtype).
    """
    growth = LAMBDA * math.sqrt(terms) * unit_roundoff(compute)
    limit = magnitude.double() * growth
    origin = f"{LAMBDA:g} sqrt({terms}) u({compute}) times the sum of magnitudes ({why})"
    if store is not None:
        limit = limit + LAMBDA * unit_roundoff(store) * torch.as_tensor(stored, dtype=torch.float64)
        origin += f", plus {LAMBDA:g} u({store}) for what is stored in it"
    return Bound(limit, origin)


def rms_ratio(got: Tensor, peer: Tensor, exact: Tensor) -> float:
    """Root mean square error of `got` over that of `peer`, a correct path that stores in the same dtype.

    All of one shape, exact in float64. 0 where got is exact, infinity where only peer is. At most ROUGHER is fine;
    an accumulator in a low precision is not, though each of its errors may stay within a bound.
    """
    mine, other = ((tensor.double() - exact).square().sum().sqrt().item() for tensor in (got, peer))
    return mine / other if other else math.inf if mine else 0.0
