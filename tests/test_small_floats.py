"""Codes and rounding of the 4- and 8-bit floats, against ml_dtypes, which shares no code with torch or with us."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from moe_conformance.judging.compare import equal
from moe_conformance.judging.inputs import bits, integers
from moe_conformance.reference_impl.quantised.fp4 import pack_e2m1, unpack_e2m1
from moe_conformance.reference_impl.quantised.fp8 import FP8, quantise_fp8
from moe_conformance.reference_impl.quantised.tiles import round_to_float, scale_values

BYTES = torch.arange(256, dtype=torch.uint8)
TWINS = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}


def through(values: Tensor, twin: Any) -> Tensor:
    """What ml_dtypes makes of float64 values, in float64."""
    return torch.from_numpy(values.numpy().astype(twin).astype(np.float64))


def read(codes: Tensor, twin: Any) -> Tensor:
    """What ml_dtypes reads in uint8 codes."""
    return torch.from_numpy(codes.numpy().view(twin).astype(np.float64))


def hard_values(codes: Tensor, largest: float) -> Tensor:
    """Every finite code's value, the middle of each two, what lies just beside it, and hashed values of all sizes.

    All are exact in float32, which ml_dtypes rounds from.
    """
    values = codes[codes.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    spread = integers((4000,), "mantissa", 2**23, -(2**23)).double() * torch.exp2(
        integers((4000,), "exponent", 8, -45).double()
    )
    found = torch.cat([values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), spread])
    return found.clamp(-largest, largest)


@pytest.mark.parametrize("dtype", list(FP8), ids=str)
def test_every_code_of_fp8_is_what_ml_dtypes_reads(dtype: torch.dtype) -> None:
    equal(str(dtype), BYTES.view(dtype).double(), read(BYTES, TWINS[dtype]))


def test_every_e8m0_scale_is_what_ml_dtypes_reads() -> None:
    want = read(BYTES, ml_dtypes.float8_e8m0fnu)
    assert want[127] == 1 and want[255].isnan()
    equal("uint8", scale_values(BYTES), want)
    equal("float8_e8m0fnu", scale_values(BYTES.view(torch.float8_e8m0fnu)), want)


def test_every_e2m1_code_is_what_ml_dtypes_reads_and_what_the_specification_lists() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    got = unpack_e2m1(codes)[0::2]  # the low nibbles; the high ones are 0
    equal("e2m1", got, read(codes, ml_dtypes.float4_e2m1fn))
    assert got.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert got[8].signbit()


@pytest.mark.parametrize("dtype", list(FP8), ids=str)
def test_values_round_to_the_nearest_fp8_and_ties_to_even(dtype: torch.dtype) -> None:
    values = hard_values(BYTES.view(dtype).double(), FP8[dtype][2])
    want = through(values, TWINS[dtype])
    equal("rounded", round_to_float(values, *FP8[dtype]), want)
    codes, _ = quantise_fp8(values.reshape(1, 1, -1), tile=(0, 0), scale=torch.ones(1, 1, 1), dtype=dtype)
    equal("codes", codes.flatten().double(), want)


def test_values_round_to_the_nearest_e2m1_code_and_ties_to_even() -> None:
    values = hard_values(unpack_e2m1(BYTES), 6.0)
    values = values[: len(values) // 2 * 2]
    packed = pack_e2m1(values)
    want = torch.from_numpy(values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8).copy())
    equal("codes", torch.stack([packed & 15, packed >> 4], -1).flatten(), want)


@pytest.mark.parametrize("dtype", list(FP8), ids=str)
def test_values_beyond_the_largest_code_saturate(dtype: torch.dtype) -> None:
    beyond = torch.tensor([1e9, -1e9, FP8[dtype][2] * 1.5]).reshape(1, 1, -1)
    codes, _ = quantise_fp8(beyond, tile=(0, 0), scale=torch.ones(1, 1, 1), dtype=dtype)
    largest = FP8[dtype][2]
    assert codes.flatten().double().tolist() == [largest, -largest, largest]


def test_float64_rounds_once() -> None:
    """1 + 1/16 + 2^-40 lies above the middle of 1 and 1.125; rounded to float32 first it would be a tie, and give 1."""
    assert round_to_float(torch.tensor(1 + 2**-4 + 2**-40, dtype=torch.float64), 3, -6, 448.0).item() == 1.125


def test_the_first_of_two_values_is_the_low_nibble() -> None:
    assert unpack_e2m1(torch.tensor([0x21, 0xF0], dtype=torch.uint8)).tolist() == [0.5, 1.0, 0.0, -6.0]
    assert pack_e2m1(torch.tensor([0.5, 1.0, 0.0, -6.0], dtype=torch.float64)).tolist() == [0x21, 0xF0]


def test_packing_is_the_inverse_of_unpacking() -> None:
    packed = (bits((3, 5, 8), "packed") & 255).to(torch.uint8)
    equal("packed", pack_e2m1(unpack_e2m1(packed)), packed)
