"""What messages say of holes, and of errors where the bound is 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import Bound

NAN = float("nan")


def said(got: list[float], want: list[float], limit: list[float]) -> str:
    with pytest.raises(Nonconformance) as raised:
        compare.close("sum", _row(got), _row(want), Bound(_row(limit), "a reason"))
    return str(raised.value)


def _row(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("got", "want", "holes"), [(NAN, 1.0, "got"), (1.0, NAN, "want"), (NAN, NAN, "got and in want")]
)
def test_a_hole_is_told_with_the_side_that_has_it(got: float, want: float, holes: str) -> None:
    message = said([1.0, got], [1.0, want], [0.1, 0.1])
    assert message == (
        f"sum: 1 of 2 differ, first at [1]: got {got}, want {want}; hole in {holes}: never written, or made of what "
        "was not or of no number"
    )


def test_beside_a_hole_the_largest_error_is_that_of_numbers() -> None:
    assert said([NAN, 1.5], [1.0, 1.0], [0.1, 0.1]).endswith("; largest error is 5 times the bound (a reason)")


def test_bits_that_are_a_hole_are_told_as_one() -> None:
    with pytest.raises(Nonconformance, match=r"got nan, want 1\.0; hole in got: never written"):
        compare.equal("sum", _row([NAN]), _row([1.0]))


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (0.0, "largest error is 0.5 where the bound is 0 (a reason)"),
        (1e-45, "largest error is 0.5 where the bound is about 0 (a reason)"),
        (0.25, "largest error is 2 times the bound (a reason)"),
    ],
)
def test_a_bound_of_0_is_said_to_be_0(limit: float, told: str) -> None:
    assert said([1.5], [1.0], [limit]) == f"sum: 1 of 1 differ, first at [0]: got 1.5, want 1.0; {told}"
