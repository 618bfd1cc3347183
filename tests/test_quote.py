"""Foreign values in messages."""

from __future__ import annotations

from typing import Any

import pytest

from moe_conformance.quote import few, plainly, quoted


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (24, "24"),
        ("silu", "'silu'"),
        ([True, None, 2.5], "[True, None, 2.5]"),
        ({"a": [1]}, "{'a': [1]}"),
        (10**400, "an integer of 1329 bits"),
        (deep(10**5), "[[[[...]]]]"),
        (list(range(10**5)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ("\x1b[31m\ud800\n", r"'\x1b[31m\ud800\n'"),
    ],
)
def test_a_value_is_short_and_printable(value: Any, text: str) -> None:
    assert quoted(value) == text


def test_a_long_text_is_cut() -> None:
    assert len(quoted("x" * 10**6)) == len(plainly("x" * 10**6)) + 2 == 200


def test_of_many_the_first_few_are_named() -> None:
    assert few(["a", 2.5]) == "a, 2.5"
    assert few(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, ..."
