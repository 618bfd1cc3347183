"""Inputs from an integer hash: the same bits on every machine, torch version and dtype.

Values are small integers times a power of two, so they are exact in bfloat16, float16, float32 and float64:
an oracle in float64 sees exactly what the engine sees. Those of `fine` are exact in their own dtype alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_conformance.judging.draws import note, salt


def _mix(counter: Tensor, seed: int) -> Tensor:
    """Splitmix64 (Steele, Lea, Flood 2014) of counter + seed, in wrapping int64."""
    z = counter + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return z ^ (z >> 31 & (1 << 33) - 1)


def bits(shape: Sequence[int], seed: str) -> Tensor:
    """int64 hash values in [0, 2^62) of the given shape; another seed string gives another stream, as does a run's
    --seed."""
    return hashed(shape, seed + salt())


def hashed(shape: Sequence[int], seed: str) -> Tensor:
    """As `bits`, without the run's seed."""
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
    counter = torch.arange(math.prod(shape), dtype=torch.int64) * -0x61C8864680B583EB  # golden gamma
    return (_mix(counter, key) >> 2 & (1 << 62) - 1).reshape(tuple(shape))


def integers(shape: Sequence[int], seed: str, high: int, low: int = 0) -> Tensor:
    """int64 in [low, high)."""
    return bits(shape, seed) % (high - low) + low


def normal(shape: Sequence[int], seed: str, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """Bell-shaped values: the sum of four 6-bit integers, at most 8 significant bits, times a power of two.

    std must be a power of two; the spread is 1.15 times std.
    """
    if math.frexp(std)[0] != 0.5:
        raise ValueError(f"std: got {std}, want a power of two, so that values are exact in every dtype")
    drawn = bits(shape, seed)
    total = sum((drawn >> 6 * i & 63 for i in range(4)), start=torch.zeros((), dtype=torch.int64)) - 126
    found = (total.double() * (std / 32)).to(dtype)
    note("normal", tuple(shape), seed + salt(), dtype, std, drawn=found)
    return found


def fine(shape: Sequence[int], seed: str, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """As `normal`, and in float32 with bits that two bytes cannot hold, so that a narrower copy on the way shows."""
    if dtype != torch.float32:
        return normal(shape, seed, dtype, std)
    drawn = bits(shape, seed)
    total = sum((drawn >> 6 * i & 63 for i in range(4)), start=torch.zeros((), dtype=torch.int64)) - 126
    # Seven bits before the point, sixteen other ones behind it: 23 of float32's 24.
    found = ((total.double() + (drawn >> 24 & 0xFFFF) * 2.0**-16) * (std / 32)).to(dtype)
    note("fine", tuple(shape), seed + salt(), dtype, std, drawn=found)
    return found


def distinct_logits(tokens: int, experts: int, seed: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, E] logits without ties within a row, both signs, spaced at least 1/16 apart near zero.

    Exact in bfloat16 up to 256 experts, exact in float32 beyond.
    """
    order = bits((tokens, experts), seed).argsort(dim=-1)
    step = 1 / 16 if experts <= 256 else 1 / 64
    found = ((order - experts // 2).double() * step).to(dtype)
    note("distinct_logits", tokens, experts, seed + salt(), dtype, drawn=found)
    return found


def poison_(tensor: Tensor) -> Tensor:
    """Overwrite with NaN, or with the dtype's minimum for integers: never a legal value or expert id."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, every torch.empty, empty_like and new_empty of any engine comes back filled with NaN or INT_MAX.

    torch's own switch (torch.utils.deterministic.fill_uninitialized_memory), which works in deterministic mode only.
    The mode is set below torch.use_deterministic_algorithms, which would import Dynamo and Inductor, seconds of it.
    """
    deterministic: Any = torch.utils.deterministic  # a module whose attributes exist only at run time
    was_on, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = deterministic.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(was_on, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


def windows(shape: Sequence[int], seed: str, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """As `fine`, for weights of real models: rows are overlapping windows of one hashed stretch, which is cheap.

    No two rows are equal, nor are two matrices of a stack.
    """
    strides = [61, 1]  # a prime row step keeps windows from lining up with powers of two
    for _ in shape[:-2]:
        strides.insert(0, 1009 * strides[0])
    length = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    found = fine((length,), seed, dtype, std).as_strided(tuple(shape), tuple(strides)).contiguous()
    note("windows", tuple(shape), seed + salt(), dtype, std, drawn=found)
    return found


def matrix(shape: Sequence[int], seed: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights [.., out, in] of about 1 / sqrt(in), so that no part of a layer hides in another's rounding."""
    values = windows if shape[-1] > 256 else fine
    return values(shape, seed, dtype, 2.0 ** round(-0.5 * (shape[-1] - 1).bit_length()))


def padding_rows(tensor: Tensor, tokens: int) -> Tensor:
    """The first so many rows, and behind them NaN, infinities and the dtype's largest number, in turn."""
    most, infinity = torch.finfo(tensor.dtype).max, math.inf
    changed = tensor.clone()
    for row in range(tokens, len(tensor)):
        changed[row] = (math.nan, infinity, -infinity, most)[row % 4]
    return changed
