"""What enters w2, of float32 gate and up in registers. Twin of `activate` in reference_impl/experts.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), using exponentials of negative numbers only, so that nothing overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0. Kahan's trick: the rounding error of 1 + u is cancelled by the same rounding of u."""
    u = tl.exp(x)
    y = 1.0 + u
    return tl.where(y == 1.0, u, tl.log(y) * (u / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_exp(-tl.abs(x))


@triton.jit
def tanh(x):
    """Near 0, where 1 - exp(-2|x|) cancels, the series to x^9: its next term is below 2^-26 of x at 1/4."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def act(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return v * sigmoid(v)
    elif ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))  # sqrt(1/2)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2/pi) (v + 0.044715 v^3)
        return v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "relu":
        return tl.where(v < 0, 0.0, v)  # NaN stays NaN
    else:
        tl.static_assert(ACTIVATION == "relu2")
        r = tl.where(v < 0, 0.0, v)
        return r * r


@triton.jit
def activate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CLAMP: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """float32 of the same shape; see MLPSpec. up is not looked at without a gate."""
    if not GATED:
        return act(ALPHA * gate, ACTIVATION) / ALPHA
    if CLAMP == "before":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    if CLAMP == "tanh":
        activated = LIMIT * tanh(gate / LIMIT) * sigmoid(gate)
        up = UP_LIMIT * tanh(up / UP_LIMIT)
    else:
        activated = act(ALPHA * gate, ACTIVATION) / ALPHA
    if CLAMP == "after":
        activated = tl.where(activated > LIMIT, LIMIT, activated)
    if CLAMP == "before" or CLAMP == "after":
        up = tl.where(up > UP_LIMIT, UP_LIMIT, tl.where(up < -UP_LIMIT, -UP_LIMIT, up))
    return activated * (up + UP_OFFSET)
