"""Derived bounds: the numbers of small cases by hand, how they scale, and the rule of the root mean square."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from moe_conformance.oracle.tolerance import (
    ROUGHER,
    Contract,
    Value,
    relative,
    rms_ratio,
    softmax_weights,
    sums,
    unit_roundoff,
    wide,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
U = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-24, FP64: 2**-53}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FP64)


def value(exact: list[float], spread: list[float], reach: list[float] | None = None) -> Value:
    return Value(tensor(*exact), tensor(*spread), None if reach is None else tensor(*reach))


def near(got: Tensor, *want: float) -> None:
    assert got.flatten().tolist() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", U)
def test_a_unit_roundoff_is_half_the_distance_from_1_to_the_next_number(dtype: torch.dtype) -> None:
    assert unit_roundoff(dtype) == U[dtype]
    assert wide(dtype) == (FP64 if dtype == FP64 else FP32)


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


def test_roundings_of_softmax_weights_grow_with_the_span_of_finite_logits() -> None:
    logits = torch.tensor([[1.0, -2.0, 4.0, -math.inf], [0.0, 0.0, 0.5, math.inf]])
    assert softmax_weights(logits, 2) == 3 * (6 + 4) + 4 + 2 + 6
    assert softmax_weights(logits[:0], 2) == 3 * 4 + 4 + 2 + 6


def test_the_rms_rule_compares_with_a_path_of_the_same_dtype() -> None:
    exact = tensor(0.0, 0.0, 10.0)
    assert rms_ratio(tensor(3.0, -4.0, 10.0), tensor(0.0, 2.0, 10.0), exact) == 2.5
    assert rms_ratio(exact, tensor(0.0, 2.0, 10.0), exact) == 0
    assert rms_ratio(exact, exact, exact) == 0
    assert rms_ratio(tensor(1.0, 0.0, 10.0), exact, exact) == math.inf
    assert ROUGHER == 1.5


def test_contracts_name_every_tensor_a_path_stores() -> None:
    stored = Contract.stored(BF16)
    assert stored.compute == FP32
    assert {getattr(stored, f.name) for f in fields(stored)[1:]} == {BF16}
    assert Contract.stored(FP64).compute == FP64
    fused = Contract.fused(BF16)
    kept = {f.name for f in fields(fused) if getattr(fused, f.name) == BF16}
    assert kept == {"x", "hidden", "activated", "result"}
    assert {getattr(fused, f.name) for f in fields(fused)} == {BF16, FP32}


def test_a_limit_is_the_smaller_of_many_likely_errors_and_their_sum() -> None:
    near(value([1, 1], [2, 2], [9, 11]).limit, 9, 10)
    near(value([1], [2]).limit, 10)
    near(Value.of(0.7).limit, 0)
    assert Value.of(0.7).exact.item() == 0.7
    assert Value.of(torch.tensor([1.0], dtype=BF16)).spread.dtype == FP64


def test_errors_of_a_sum_add_in_squares_and_their_sum_bounds_them() -> None:
    total = value([1], [3], [3]) + value([5], [4], [4])
    near(total.exact, 6)
    near(total.spread, 5)
    near(total.limit, 7)


def test_errors_of_a_product_are_each_factor_times_the_other_s_error() -> None:
    product = value([-2], [3], [0.5]) * value([5], [4], [0.25])
    near(product.exact, -10)
    near(product.spread, math.sqrt((2 * 4) ** 2 + (5 * 3) ** 2 + (3 * 0.25) ** 2))
    near(product.limit, 2 * 0.25 + 5 * 0.5 + 0.5 * 0.25)


def test_a_rounding_adds_u_times_its_size() -> None:
    rough = value([3], [0], [0]).erring(tensor(2.0), 9, BF16)
    near(rough.exact, 3)
    near(rough.spread, 3 * 2 * 2**-8)
    near(rough.limit, 9 * 2 * 2**-8)
    near(value([3], [4 * 2**-8], [2**-8]).erring(1.0, 9, BF16).spread, 5 * 2**-8)
    near(value([3], [4], [2**-8]).erring(1.0, 9, BF16).limit, 10 * 2**-8)


def test_a_stored_value_is_rounded_once_relatively_and_below_the_normal_numbers_absolutely() -> None:
    stored = Value.of(tensor(-3.0, 1e-6)).stored(FP16)
    near(stored.limit, 3 * 2**-11, 2**-25)
    near(Value.of(tensor(-3.0)).stored(FP16, 4).spread, 2 * 3 * 2**-11)


def test_a_function_passes_on_its_largest_change_over_the_interval() -> None:
    square = value([2], [0.1], [0.25]).through(torch.square)
    near(square.exact, 4)
    near(square.spread, (2.5**2 - 4) / 5)
    near(square.limit, 2.25**2 - 4)
    near(value([-2], [0.1]).through(torch.square).limit, 2.5**2 - 4)
    near(value([3, 1], [0.1, 0.1]).through(lambda v: v.clamp(max=1.25)).limit, 0, 0.5)


def test_a_projection_inherits_errors_and_adds_those_of_its_sums() -> None:
    weight = torch.tensor([[3.0, -4.0]], dtype=BF16)
    product = Value(tensor(1.0, 2.0)[None], tensor(1e-3, 2e-3)[None]).project(weight, FP32)
    near(product.exact, -5)
    near(product.spread, math.hypot(math.hypot(3e-3, 8e-3), math.sqrt(3) * 2**-24 * 8))
    clean = Value.of(torch.ones(1, 100)).project(torch.ones(7, 100), FP32)
    near(clean.limit, *[5 * math.sqrt(101) * 2**-24 * 100] * 7)
    near(Value.of(torch.ones(1, 2)).project(torch.ones(1, 2), FP32).limit, 3 * 2**-24 * 2)


def test_a_sum_in_any_order_has_no_partial_sum_above_all_terms_of_one_sign() -> None:
    terms = Value(tensor(4.0, -1.0, 2.0)[:, None], tensor(0.3, 0.4, 0.0)[:, None], tensor(0.5, 0.25, 0.0)[:, None])
    total = terms.summed(BF16)
    near(total.exact, 5)
    near(total.spread, math.sqrt(0.25 + (6 * 2**-8) ** 2 + (5 * 2**-8) ** 2))
    near(total.limit, 0.75 + 11 * 2**-8)
    negative = Value.of(tensor(-4.0, 1.0, -2.0)[:, None]).summed(BF16)
    near(negative.limit, 11 * 2**-8)
    near(terms[:1].summed(BF16).limit, 0.5)
    near(Value.of(tensor(4.0, -1.0)[:, None]).summed(BF16).limit, 3 * 2**-8)


def test_a_quotient_has_the_errors_of_both_over_the_divisor() -> None:
    quotient = value([6], [0.3], [0.5]).over(value([-2], [0.1], [0.25]), FP32)
    near(quotient.exact, -3)
    near(quotient.spread, math.hypot(math.hypot(0.3, 0.3) / 2, 3 * 2**-24))
    near(quotient.limit, (0.5 + 3 * 0.25) / 2 + 3 * 2**-24)


def test_an_rms_norm_has_errors_of_the_element_and_of_the_norm() -> None:
    """x = (6, 8, 0, ...) of width 100 with eps 0: the mean square is 1, its root is 1."""
    x = torch.zeros(1, 1, 100, dtype=FP64)
    x[..., :2] = tensor(6.0, 8.0)
    clean = Value.of(x).rms_norm(2.0, 0.0, FP32, BF16)
    near(clean.exact[..., :3], 12, 16, 0)
    own = 6 * math.sqrt(104) * 2**-24
    near(clean.spread[..., :1], 2 * math.hypot(math.hypot(own, 6 * 2**-8), 6 * 2**-8))
    rough = Value(x.expand(1, 3, 100), torch.full((1, 3, 100), 1e-3, dtype=FP64)).rms_norm(1.0, 3.0, FP64, FP64)
    near(rough.exact[..., 0], 3, 3, 3)
    of_norm = 10e-3 / (100 * 2)
    near(rough.spread[..., 0], *[math.hypot(1e-3, 3 * of_norm) / 2] * 3)


def test_parts_keep_all_three_tensors() -> None:
    whole = value([1, 2, 3], [4, 5, 6], [7, 8, 9])
    for part in (whole[1:2], whole.gather(torch.tensor([1])), whole.map(lambda t: t.narrow(0, 1, 1))):
        assert (part.exact.item(), part.spread.item(), part.limit.item()) == (2, 5, 8)
    assert Value.stack([whole, whole]).limit.tolist() == [[7, 8, 9]] * 2
    assert Value.cat([whole, whole[:1]]).limit.tolist() == [7, 8, 9, 7]
    assert Value.cat([whole, whole[:1]]).spread.tolist() == [4, 5, 6, 4]
    assert Value.cat([Value.stack([whole, whole])] * 2).exact.tolist() == [[1, 2, 3, 1, 2, 3]] * 2


def test_a_bound_says_how_it_was_derived() -> None:
    bound = value([1], [2]).bound("two stores")
    near(bound.limit, 10)
    assert bound.origin == "derived: two stores; 5 times the root of their squares, or their sum if less"


def test_a_bound_of_a_sum_grows_with_the_root_of_its_length() -> None:
    def growth(terms: int) -> float:
        x, w = torch.rand(8, terms), torch.rand(64, terms)
        return float((Value.of(x).project(w, FP32).limit / (x.double() @ w.double().T)).mean())

    assert growth(1600) / growth(100) == pytest.approx(math.sqrt(1601 / 101))


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
