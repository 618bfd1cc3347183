"""The layer in float64, one token at a time and without any padding, and how far a correct engine may be from it.

Written apart from reference_impl, so that a fault there is not repeated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_conformance.engine import LayerInputs
from moe_conformance.tolerance import LAMBDA, Bound, softmax_weights, unit_roundoff


@dataclass(frozen=True)
class Value:
    """A vector in float64 with the spread of its rounding errors.

    Errors of independent roundings add in squares (Higham and Mary 2019); each rounding to precision u counts as
    u |value|, its largest size.
    """

    exact: Tensor
    spread: Tensor

    def __add__(self, other: Value) -> Value:
        return Value(self.exact + other.exact, torch.hypot(self.spread, other.spread))

    def times(self, factor: float, relative_error: float = 0.0) -> Value:
        spread = torch.hypot(self.spread * abs(factor), (self.exact * factor).abs() * relative_error)
        return Value(self.exact * factor, spread)

    def stored(self, dtype: torch.dtype) -> Value:
        return Value(self.exact, torch.hypot(self.spread, self.exact.abs() * unit_roundoff(dtype)))


def _project(weight: Tensor, x: Value, dtype: torch.dtype) -> Value:
    """weight @ x, accumulated in float32 in any order and stored in dtype."""
    size = weight.float().abs()  # a bound needs few digits
    magnitude = (size @ x.exact.abs().float()).double()
    accumulated = math.sqrt(x.exact.numel()) * unit_roundoff(torch.float32) * magnitude
    largest = float(x.spread.max()) or 1.0  # squares of spreads may underflow float32
    inherited = (size.square_() @ (x.spread / largest).square().float()).double().sqrt() * largest
    return Value(weight.double() @ x.exact, torch.hypot(inherited, accumulated)).stored(dtype)


def _gated_mlp(x: Value, w13: Tensor, w2: Tensor, activation: str, dtype: torch.dtype) -> Value:
    both = _project(w13, x, dtype)
    half = w13.shape[0] // 2
    gate, up = (Value(both.exact[part], both.spread[part]) for part in (slice(half), slice(half, None)))
    if activation == "silu":
        act = torch.nn.functional.silu(gate.exact)
    else:
        act = torch.nn.functional.gelu(gate.exact, approximate="tanh")
    # |silu'| <= 1.10 and |gelu'| <= 1.13; a few float32 operations inside either.
    inside = 8 * unit_roundoff(torch.float32) * (act.abs() + gate.exact.abs())
    act_spread = torch.hypot(1.13 * gate.spread, torch.hypot(inside, act.abs() * unit_roundoff(dtype)))
    spread = torch.hypot(up.exact.abs() * act_spread, act.abs() * up.spread)
    return _project(w2, Value(act * up.exact, spread).stored(dtype), dtype)


def layer(inputs: LayerInputs) -> tuple[Tensor, Bound]:
    """The exact output [T, H] in float64, and the largest error of a correct engine that stores in x's dtype."""
    dtype = inputs.x.dtype
    scores = inputs.logits.double().softmax(-1)
    weight_error = softmax_weights(inputs.logits, inputs.top_k) * unit_roundoff(torch.float32)
    if dtype != torch.float32:
        weight_error += unit_roundoff(dtype)  # some families hand weights on in the model's dtype
    exact, limit = [], []
    for x, probability in zip(inputs.x, scores, strict=True):
        ids = probability.topk(inputs.top_k).indices.tolist()
        weights = [float(probability[i]) for i in ids]
        if inputs.method != "softmax_topk":
            weights = [weight / sum(weights) for weight in weights]
        if inputs.per_expert_scale is not None:
            weights = [weight * float(inputs.per_expert_scale[i]) for weight, i in zip(weights, ids, strict=True)]
        whole = Value(x.double(), torch.zeros_like(x, dtype=torch.float64))
        token = whole if inputs.latent_in is None else _project(inputs.latent_in, whole, dtype)
        routed = Value(torch.zeros_like(token.exact), torch.zeros_like(token.exact))
        for expert, weight in zip(ids, weights, strict=True):
            output = _gated_mlp(token, inputs.w13[expert], inputs.w2[expert], inputs.activation, dtype)
            routed = (routed + output.times(weight, weight_error).stored(dtype)).stored(dtype)
        routed = routed.times(inputs.scale).stored(dtype)
        if inputs.latent_out is not None:
            routed = _project(inputs.latent_out, routed, dtype)
        if inputs.shared_w13 is not None and inputs.shared_w2 is not None:
            routed = (routed + _gated_mlp(whole, inputs.shared_w13, inputs.shared_w2, "silu", dtype)).stored(dtype)
        exact.append(routed.exact)
        limit.append(LAMBDA * routed.spread)
    if not exact:
        empty = torch.zeros(inputs.x.shape, dtype=torch.float64)
        return empty, Bound(empty, "no tokens")
    origin = f"{LAMBDA:g} times the spread of float32 sums and {dtype} stores, carried through the layer"
    return torch.stack(exact), Bound(torch.stack(limit), origin)
