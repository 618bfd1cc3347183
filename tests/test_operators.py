"""Specs as arguments of opaque operators: by field name, and no type is guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moe_conformance.engine import Capacity, MLPSpec, RoutingSpec
from moe_conformance.reference_impl.operators import arguments, keywords, operator


@dataclass(frozen=True)
class Unknown:
    width: int
    sizes: tuple[int, int] = (1, 2)


def test_words_numbers_and_flags_have_the_schema_types_of_their_annotations() -> None:
    found = arguments(MLPSpec)
    assert found.startswith("*, int width, str activation, bool gated, str clamp, float limit")
    assert "str score_dtype" in arguments(RoutingSpec, without=("capacity",))


@pytest.mark.parametrize(("spec", "field"), [(Unknown, "Unknown.sizes"), (RoutingSpec, "RoutingSpec.capacity")])
def test_a_type_that_no_schema_has_is_an_error(spec: type, field: str) -> None:
    with pytest.raises(TypeError, match=rf"{field}: got .*, want int, float, bool, str or a Literal of strings"):
        arguments(spec)


def test_a_spec_comes_back_whole_through_an_operator() -> None:
    seen = []

    def function(x: torch.Tensor, **fields: Any) -> torch.Tensor:
        seen.append(RoutingSpec(**fields))
        return x.clone()

    schema = f"returns_spec(Tensor x, {arguments(RoutingSpec, without=('capacity',))}) -> Tensor"
    call = operator(schema, function, lambda x, **_: x.new_empty(x.shape))
    spec = RoutingSpec(3, score="sigmoid", selector="topk", groups=4, group_mask=0.0, scale=2.5, selection_bias=True)
    for given in (spec, RoutingSpec(1), replace(spec, capacity=Capacity(3))):
        call(torch.zeros(1), **keywords(given, without=("capacity",)))
    assert seen == [spec, RoutingSpec(1), spec]
