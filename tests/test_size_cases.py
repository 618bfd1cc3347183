"""The cases of sizes are a covering design: each two values of any two sizes meet in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

import pytest

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.align import cases as align
from moe_conformance.suites.experts import cases as experts
from moe_conformance.suites.layer import cases as layer


def of_experts(case: Case) -> dict[str, Any]:
    mlp = case["mlp"]
    function = (mlp.activation, mlp.gated, mlp.bias, mlp.clamp)
    return {name: case[name] for name in ("T", "E", "K", "D", "F", "dtype")} | {"function": function}


def of_align(case: Case) -> dict[str, Any]:
    return {name: case[name] for name in ("T", "E", "K", "block", "dtype")}


def of_layer(case: Case) -> dict[str, Any]:
    spec = case["spec"]
    return {
        "T": case["tokens"],
        "E": spec.num_experts,
        "K": spec.routing.top_k,
        "H": spec.hidden_size,
        "F": spec.experts.width,
        "tile": case.id.partition("-tile")[2].partition("-")[0],
        "dtype": case["dtype"],
        "shared": spec.shared is not None,
    }


def missing(rows: list[Mapping[str, Any]]) -> list[str]:
    """Pairs of values that no row has, but for more choices than experts."""
    found = []
    for one, other in combinations(rows[0], 2):
        there = {(row[one], row[other]) for row in rows}
        for values in product({row[one] for row in rows}, {row[other] for row in rows}):
            if values not in there and not ((one, other) == ("E", "K") and values[1] > values[0]):
                found.append(f"{one} = {values[0]}, {other} = {values[1]}")
    return found


@pytest.mark.parametrize(
    ("cases", "sizes", "levels"),
    [
        (align.SIZES, of_align, 17),
        (experts.SIZE_CASES, of_experts, 24),
        (layer.SIZE_CASES, of_layer, 24),
    ],
    ids=["align", "experts", "layer"],
)
def test_each_two_values_meet(cases: tuple[Case, ...], sizes: Any, levels: int) -> None:
    rows = [sizes(case) for case in cases]
    assert missing(rows) == []
    assert sum(len({row[name] for row in rows}) for name in rows[0]) == levels  # a row that is gone takes none along


def test_a_pair_that_never_meets_is_named() -> None:
    assert missing([{"T": 1, "D": 20}, {"T": 9, "D": 64}, {"T": 1, "D": 64}]) == ["T = 9, D = 20"]


def test_the_core_tier_has_long_lists_of_one_expert_and_many_choices() -> None:
    core = [case for case in experts.SIZE_CASES if case.tier == "core"]
    assert any(case["hot"] is not None and case["T"] > 512 and case["K"] > 8 for case in core)
