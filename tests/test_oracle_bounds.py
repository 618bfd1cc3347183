"""Bounds and storage policies: the numbers of small cases by hand, and the rule of the root mean square."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from moe_conformance.oracle.bounds import ROUGHER, relative, rms_ratio, sums
from moe_conformance.oracle.precision import in_precision, unit_roundoff, wide
from moe_conformance.oracle.storage import Storage

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
U = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-24, FP64: 2**-53}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FP64)


def near(got: Tensor, *want: float) -> None:
    assert got.flatten().tolist() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", U)
def test_a_unit_roundoff_is_half_the_distance_from_1_to_the_next_number(dtype: torch.dtype) -> None:
    assert unit_roundoff(dtype) == U[dtype]
    assert wide(dtype) == in_precision(dtype, "float32") == (FP64 if dtype == FP64 else FP32)
    assert in_precision(dtype, "input") == dtype


def test_a_relative_bound_is_gamma_n_of_the_value_and_an_underflow() -> None:
    bound = relative(torch.tensor([-4.0, 0.0], dtype=BF16), 16, BF16, "sixteen")
    near(bound.limit, 4 * (1 / 16) / (1 - 1 / 16) + 2**-126, 2**-126)
    assert bound.limit.dtype == FP64
    assert bound.origin == "16 roundings of torch.bfloat16 (sixteen), gamma_n = 6.67e-02, relative"


def test_a_bound_of_sums_grows_with_the_root_of_the_terms() -> None:
    near(sums(tensor(2.0), 9, FP32, "").limit, 5 * 3 * 2**-24 * 2)
    bound = sums(torch.tensor([2.0]), 9, FP32, "why", torch.tensor([3.0]), BF16)
    near(bound.limit, 5 * 3 * 2**-24 * 2 + 5 * 2**-8 * 3)
    sum_part, stored_part = bound.origin.split(", plus ")
    assert sum_part == "5 sqrt(9) u(torch.float32) times the sum of magnitudes (why)"
    assert stored_part == "5 u(torch.bfloat16) for what is stored in it"


def test_the_rms_rule_compares_with_a_path_of_the_same_dtype() -> None:
    exact = tensor(0.0, 0.0, 10.0)
    assert rms_ratio(tensor(3.0, -4.0, 10.0), tensor(0.0, 2.0, 10.0), exact) == 2.5
    assert rms_ratio(exact, tensor(0.0, 2.0, 10.0), exact) == 0
    assert rms_ratio(exact, exact, exact) == 0
    assert rms_ratio(tensor(1.0, 0.0, 10.0), exact, exact) == math.inf
    assert ROUGHER == 1.5


def test_policies_name_every_tensor_a_path_stores() -> None:
    stored = Storage.stored(BF16)
    assert stored.compute == FP32
    assert {getattr(stored, f.name) for f in fields(stored)[1:]} == {BF16}
    assert Storage.stored(FP64).compute == FP64
    fused = Storage.fused(BF16)
    kept = {f.name for f in fields(fused) if getattr(fused, f.name) == BF16}
    assert kept == {"x", "hidden", "activated", "result"}
    assert {getattr(fused, f.name) for f in fields(fused)} == {BF16, FP32}


def test_an_accumulator_in_the_dtype_is_rougher_than_the_rms_rule_allows() -> None:
    """Each error may be within its bound; together they are more than half again a correct path's."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(32, 1024, generator=random).to(BF16) for _ in range(2))
    exact = x.double() @ weight.double().T
    peer = (x.float() @ weight.float().T).to(BF16)
    in_order = (x.float().flip(1) @ weight.float().flip(1).T).to(BF16)
    narrow = torch.zeros_like(peer)
    for a, b in zip(x.split(16, 1), weight.split(16, 1), strict=True):
        narrow = (narrow + a.float() @ b.float().T).to(BF16)
    assert rms_ratio(in_order, peer, exact) < 1.05
    assert rms_ratio(narrow, peer, exact) > ROUGHER
