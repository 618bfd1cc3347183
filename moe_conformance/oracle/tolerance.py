"""Error bounds derived from dtype and operation count, not tuned.

Notation of Higham, Accuracy and Stability of Numerical Algorithms (2002): u is the unit roundoff, n the number of
roundings on the longest path. A sum of n products computed in one precision differs from the exact one by at
most gamma_n = n u / (1 - n u) times the sum of magnitudes; with the probabilistic bound of Higham and Mary (2019)
by lambda * sqrt(n) * u times it, with failure probability 2 exp(-lambda^2 / 2) for one sum.

A chain of operations has a bound of the same kind: `Value` carries beside every exact element the spread of its error,
the root of the sum of the squares of all roundings on its way, each at its largest, u |value|. By Hoeffding's
inequality independent roundings of mean zero exceed lambda spreads with probability 2 exp(-lambda^2 / 2) at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# lambda = 5 makes one false alarm in about 130,000 sums under the model's assumptions (2 exp(-12.5) = 7.5e-6 each),
# and roundings that are not adversarial stay far below: measured at most 0.6 of the bound.
LAMBDA = 5.0

# How much larger than a same-dtype path's the root mean square of the errors may be. One rounding of the output more
# than the path makes 1.26 (measured: the sum over experts kept in the dtype), an accumulator in the dtype 2.3.
ROUGHER = 1.5


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of products are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Bound:
    """limit: largest allowed absolute error, element by element, float64. origin: how it was derived, for messages."""

    limit: Tensor
    origin: str


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


def softmax_weights(logits: Tensor, top_k: int) -> float:
    """Roundings on the path from float32 logits [T, E] to renormalised top-k weights.

    exp(l - max): the subtraction's error is multiplied by |l - max| (the derivative of exp in its argument), at most
    `span` u; exp itself 2 ulp. Softmax denominator: E additions. Division. Renormalisation: K additions and a
    division. Scale: one product. Numerator and denominators each carry the span.
    """
    finite = torch.where(logits.isfinite(), logits.double(), logits.new_zeros((), dtype=torch.float64))
    span = float((finite.amax(-1) - finite.amin(-1)).max()) if finite.numel() else 0.0
    return 3 * (span + 4) + logits.shape[-1] + top_k + 6


def rms_ratio(got: Tensor, peer: Tensor, exact: Tensor) -> float:
    """Root mean square error of `got` over that of `peer`, a correct path that stores in the same dtype.

    All of one shape, exact in float64. 0 where got is exact, infinity where only peer is. At most ROUGHER is fine;
    an accumulator in a low precision is not, though each of its errors may stay within a bound.
    """
    mine, other = ((tensor.double() - exact).square().sum().sqrt().item() for tensor in (got, peer))
    return mine / other if other else math.inf if mine else 0.0


@dataclass(frozen=True)
class Contract:
    """In which dtype a path keeps what it computes, in data order. Sums of products run in `compute`.

    x: what enters an expert, where that is not the layer's own input (latent projection, norm, x times weight).
    hidden: gate and up. activation: what a path that calls one operation after another stores inside the activation.
    activated: what enters w2. expert: an expert's output. weights: routing weights. weighted: output times weight.
    total: the sum over a token's experts. result: everything after that sum.
    """

    compute: torch.dtype
    x: torch.dtype
    hidden: torch.dtype
    activation: torch.dtype
    activated: torch.dtype
    expert: torch.dtype
    weights: torch.dtype
    weighted: torch.dtype
    total: torch.dtype
    result: torch.dtype

    @classmethod
    def stored(cls, dtype: torch.dtype) -> Contract:
        """Every tensor is stored in dtype, the running sum over experts included: as eager transformers does.

        The loosest contract that engines keep, so the one for an engine whose kernels are not known.
        """
        return cls(wide(dtype), dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype)

    @classmethod
    def fused(cls, dtype: torch.dtype) -> Contract:
        """Kernels that store gate and up, what enters w2, and the result in dtype, and keep all else in `compute`."""
        kept = wide(dtype)
        return replace(cls.stored(dtype), activation=kept, expert=kept, weights=kept, weighted=kept, total=kept)


@dataclass(frozen=True)
class Value:
    """What a tensor is exactly, and two bounds on its error carried along: float64, one shape.

    spread: the root of the sum of squares of all roundings so far; LAMBDA spreads bound the error of many. reach: all
    of them with one sign, which is the smaller bound of a few, or after a large one on top of many small; None where
    it is not worth its cost. limit: the smaller of both.
    """

    exact: Tensor
    spread: Tensor
    reach: Tensor | None = None

    @property
    def limit(self) -> Tensor:
        likely = LAMBDA * self.spread
        return likely if self.reach is None else torch.minimum(self.reach, likely)

    @classmethod
    def of(cls, tensor: Tensor | float) -> Value:
        """A tensor or number without error."""
        exact = torch.as_tensor(tensor, dtype=torch.float64)
        return cls(exact, torch.zeros_like(exact))

    @classmethod
    def stack(cls, values: Sequence[Value]) -> Value:
        """In a new first dim."""
        return cls(*(torch.stack(parts) for parts in zip(*((v.exact, v.spread, v.limit) for v in values), strict=True)))

    @classmethod
    def cat(cls, values: Sequence[Value]) -> Value:
        """Side by side in the last dim."""
        parts = zip(*((v.exact, v.spread, v.limit) for v in values), strict=True)
        return cls(*(torch.cat(part, dim=-1) for part in parts))

    def map(self, view: Callable[[Tensor], Tensor]) -> Value:
        """Elements moved or left out."""
        return Value(view(self.exact), view(self.spread), view(self.limit))

    def gather(self, index: Tensor) -> Value:
        """By index in the last dim, as torch.gather."""
        return self.map(lambda t: t.gather(-1, index))

    def __getitem__(self, index: Any) -> Value:
        return self.map(lambda t: t[index])

    def __add__(self, other: Value) -> Value:
        return Value(self.exact + other.exact, torch.hypot(self.spread, other.spread), self.limit + other.limit)

    def __mul__(self, other: Value) -> Value:
        """Three errors of a b: a db, b da and da db, the last at its largest."""
        a, b = self.exact.abs(), other.exact.abs()
        spread = torch.hypot(torch.hypot(a * other.spread, b * self.spread), self.spread * other.limit)
        return Value(self.exact * other.exact, spread, a * other.limit + (b + other.limit) * self.limit)

    def erring(self, size: Tensor | float, roundings: float, dtype: torch.dtype) -> Value:
        """With that many more independent errors, each of u(dtype) times size."""
        each = unit_roundoff(dtype) * torch.as_tensor(size, dtype=torch.float64)
        spread = torch.hypot(self.spread, math.sqrt(roundings) * each.expand_as(self.spread))
        return Value(self.exact, spread, self.limit + roundings * each)

    def stored(self, dtype: torch.dtype, times: float = 1) -> Value:
        """Rounded to dtype, `times` times; below the smallest normal number roundings are absolute."""
        return self.erring(self.exact.abs().clamp(min=torch.finfo(dtype).tiny), times, dtype)

    def through(self, curve: Callable[[Tensor], Tensor]) -> Value:
        """A function of each element: its largest change over the interval that the element may lie in.

        For a monotone function that is at an end of the interval, whatever its slope and curvature: no Lipschitz
        constant is needed, and a clamp lets no error through that it would cut. silu and gelu fall to one minimum and
        rise again; there too the larger change is at an end, the one farther from the minimum.
        """
        exact = curve(self.exact)

        def change(radius: Tensor) -> Tensor:
            return torch.maximum(*((curve(self.exact + step) - exact).abs() for step in (radius, -radius)))

        return Value(exact, change(LAMBDA * self.spread) / LAMBDA, change(self.limit))

    def project(self, weight: Tensor, compute: torch.dtype) -> Value:
        """self [T, in] @ weight [out, in]^T, accumulated in `compute` in any order.

        n products and n - 1 additions. Whatever the order, no partial sum is larger than m, all positive products
        together or all negative ones; roundings of the products add up to at most 2 m, or the root of 2 m^2.
        """
        factors, terms = weight.double(), weight.shape[-1]
        exact, magnitude = self.exact @ factors.T, self.exact.abs() @ factors.abs().T
        inherited = (self.spread.square() @ factors.square().T).sqrt()
        return Value(exact, inherited).erring((magnitude + exact.abs()) / 2, terms + 1, compute)

    def summed(self, dtype: torch.dtype) -> Value:
        """Over dim 0, in any order, every partial sum of two terms and more stored in dtype.

        Whatever the order, no partial sum is larger than all positive terms together, or all negative ones.
        """
        additions = self.exact.shape[0] - 1
        partial = torch.maximum(self.exact.clamp(min=0).sum(0), -self.exact.clamp(max=0).sum(0))
        total = Value(self.exact.sum(0), self.spread.square().sum(0).sqrt(), self.limit.sum(0))
        return total.erring(partial, additions - 1, dtype).stored(dtype) if additions > 0 else total

    def over(self, other: Value, dtype: torch.dtype) -> Value:
        """self / other, stored in dtype; other's error must be small against it."""
        quotient, scale = self.exact / other.exact, other.exact.abs()
        spread = torch.hypot(self.spread, quotient * other.spread) / scale
        return Value(quotient, spread, (self.limit + quotient.abs() * other.limit) / scale).stored(dtype)

    def rms_norm(self, weight: Tensor | float, eps: float, compute: torch.dtype, store: torch.dtype) -> Value:
        """x / sqrt(mean(x^2) + eps), stored, times weight, stored; the mean in `compute`."""
        width = self.exact.shape[-1]
        norm = (self.exact.square().mean(-1, keepdim=True) + eps).sqrt()
        spread = (self.exact * self.spread).square().sum(-1, keepdim=True).sqrt() / (width * norm)
        divisor = Value(norm, spread).erring(norm, width + 4, compute)  # squares, sum, mean, eps, root
        return (self.over(divisor, store) * Value.of(weight)).stored(store)

    def bound(self, origin: str) -> Bound:
        return Bound(self.limit, f"derived: {origin}; {LAMBDA:g} times the root of their squares, or their sum if less")
