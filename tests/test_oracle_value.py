"""Arithmetic that carries its errors: the numbers of small cases by hand, and how they scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_conformance.oracle.value import Value

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FP64)


def value(exact: list[float], spread: list[float], reach: list[float] | None = None) -> Value:
    return Value(tensor(*exact), tensor(*spread), None if reach is None else tensor(*reach))


def near(got: Tensor, *want: float) -> None:
    assert got.flatten().tolist() == pytest.approx(want, rel=1e-12, abs=0)


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
    near(quotient.spread, math.hypot(math.hypot(0.3, 0.3) / 1.75, 3 * 2**-24))
    near(quotient.limit, (0.5 + 3 * 0.25) / 1.75 + 3 * 2**-24)
    assert value([1], [0]).over(value([0.5], [1], [0.5]), FP32).limit.item() == math.inf


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
    near(rough.spread[..., 0], *[math.hypot(1e-3, 3 * of_norm) / (2 - 5 * of_norm)] * 3)


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
