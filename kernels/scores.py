"""Scores of router logits in registers. Twin of `score` and `in_precision` in reference_impl/routing.py."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_conformance.kernels.activation import log1p_exp, sigmoid, softplus, tanh
from moe_conformance.kernels.launch import rounded, widened


@triton.jit
def in_precision(x, dtype: tl.constexpr):
    """float32 x rounded to dtype, as float32; what a model that routes in its own dtype keeps after each step."""
    if dtype == tl.float32:
        return x
    return widened(rounded(x, dtype)).to(tl.float32)


@triton.jit
def condition(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """logit_scale * logits, capped at +-softcap by tanh where there is a cap."""
    logits = in_precision(logits * logit_scale, dtype)
    if HAS_SOFTCAP:
        inner = in_precision(logits / softcap, dtype)
        logits = in_precision(softcap * in_precision(tanh(inner), dtype), dtype)
    return logits


@triton.jit
def softmax(logits, mask):
    """Softmax of each row over those in mask; the others get 0."""
    largest = tl.max(tl.where(mask, logits, float("-inf")), axis=1)
    exponentials = tl.where(mask, tl.exp(logits - largest[:, None]), 0.0)
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def score(logits, mask, SCORE: tl.constexpr, dtype: tl.constexpr):
    """The score of each logit of a row; softmax over those in mask, the others get 0."""
    if SCORE == "softmax":
        scores = softmax(logits, mask)
    elif SCORE == "sigmoid":
        scores = tl.where(mask, sigmoid(logits), 0.0)
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        scores = tl.where(mask, tl.sqrt_rn(in_precision(softplus(logits), dtype)), 0.0)
    return in_precision(scores, dtype)


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)): very negative logits still differ although their scores underflow to 0."""
    return tl.minimum(x, 0.0) - log1p_exp(-tl.abs(x))
