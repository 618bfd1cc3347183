"""Arithmetic in float64 that carries its rounding errors along.

`Value` carries beside every exact element the spread of its error, the root of the sum of the squares of all roundings
on its way, each at its largest, u |value|. By Hoeffding's inequality independent roundings of mean zero exceed lambda
spreads with probability 2 exp(-lambda^2 / 2) at most. For u, lambda and the sums of products see precision.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_conformance.oracle.bounds import Bound
from moe_conformance.oracle.precision import LAMBDA, unit_roundoff, wide

__all__ = ["LAMBDA", "Value", "unit_roundoff", "wide"]


@dataclass(frozen=True)
class Value:
    """The exact value of a tensor, and two bounds on its error that are carried along; all float64 of one shape.

    spread: the root of the sum of squares of all roundings so far; LAMBDA spreads bound the error of many. reach: the
    sum of all roundings with one sign, which is the smaller bound for few roundings, or for one large among many small
    ones; None where it is not worth its cost. limit: the smaller of both.
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
        """The same view of value and errors: elements moved or left out."""
        return Value(view(self.exact), view(self.spread), view(self.limit))

    def gather(self, index: Tensor) -> Value:
        """By index in the last dim, as torch.gather."""
        return self.map(lambda t: t.gather(-1, index))

    def __getitem__(self, index: Any) -> Value:
        return self.map(lambda t: t[index])

    def __add__(self, other: Value) -> Value:
        return Value(self.exact + other.exact, torch.hypot(self.spread, other.spread), self.limit + other.limit)

    def __mul__(self, other: Value) -> Value:
        """The error of a b has three parts: a db, b da, and da db at its largest."""
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

        For a monotone function the largest change is at an end of the interval, whatever its slope and curvature: no
        Lipschitz constant is needed, and a clamp cuts errors as it cuts values. silu and gelu fall to one minimum and
        rise again; there, too, the larger change is at an end, the one farther from the minimum.
        """
        exact = curve(self.exact)

        def change(radius: Tensor) -> Tensor:
            return torch.maximum(*((curve(self.exact + step) - exact).abs() for step in (radius, -radius)))

        return Value(exact, change(LAMBDA * self.spread) / LAMBDA, change(self.limit))

    def snapped(self, grid: Callable[[Tensor], Tensor]) -> Value:
        """The point of a grid that each element goes to: none errs but those near a middle, and these by whole steps.

        A step is one rounding at its largest, whichever part of the interval leads to it.
        """
        exact = grid(self.exact)
        step = torch.maximum(*((grid(self.exact + by) - exact).abs() for by in (self.limit, -self.limit)))
        return Value(exact, step, step)

    def largest_of(self, group: int) -> Value:
        """The largest of every `group` elements of the last dim, for each of them; the last group may be cut."""
        width = self.exact.shape[-1]

        def largest(tensor: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(tensor, (0, -width % group), value=-math.inf)
            most: Tensor = padded.unflatten(-1, (-1, group)).amax(-1)
            return most.repeat_interleave(group, -1)[..., :width]

        return self.map(largest)

    def project(self, weight: Tensor | Value, compute: torch.dtype, more: int = 0) -> Value:
        """self [T, in] @ weight [out, in]^T, accumulated in `compute` in any order; more: roundings of partial sums.

        n products and n - 1 additions. Whatever the order, no partial sum is larger than m, all positive products
        together or all negative ones; roundings of the products add up to at most 2 m, or the root of 2 m^2.
        """
        factors, terms = weight.exact if isinstance(weight, Value) else weight.double(), self.exact.shape[-1]
        exact, magnitude = self.exact @ factors.T, self.exact.abs() @ factors.abs().T
        inherited = self.spread.square() @ factors.square().T
        if isinstance(weight, Value):
            inherited = inherited + (self.exact.abs() + self.limit).square() @ weight.spread.square().T
        return Value(exact, inherited.sqrt()).erring((magnitude + exact.abs()) / 2, terms + 1 + more, compute)

    def summed(self, dtype: torch.dtype) -> Value:
        """Over dim 0, in any order, every partial sum of two terms and more stored in dtype.

        Whatever the order, no partial sum is larger than all positive terms together, or all negative ones.
        """
        additions = self.exact.shape[0] - 1
        partial = torch.maximum(self.exact.clamp(min=0).sum(0), -self.exact.clamp(max=0).sum(0))
        total = Value(self.exact.sum(0), self.spread.square().sum(0).sqrt(), self.limit.sum(0))
        return total.erring(partial, additions - 1, dtype).stored(dtype) if additions > 0 else total

    def over(self, other: Value, dtype: torch.dtype) -> Value:
        """self / other, stored in dtype; anything where other may be 0."""
        quotient, scale = self.exact / other.exact, (other.exact.abs() - other.limit).clamp(min=0)
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
