"""What the first protocol had says what took its place, and docs/migrating.md has it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_conformance import engine
from moe_conformance.catalogue import aliases
from moe_conformance.engine import (
    ExpertsInputs,
    LayerInputs,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RouteInputs,
    RouterSpec,
    RoutingSpec,
    ShardInputs,
)

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
SPEC = LayerSpec(8, 4, LogitsSpec(), RoutingSpec(2), MLPSpec(8))
X = torch.zeros((1, 8))
WHOLE = ExpertsInputs(X, SPEC.experts, {}, torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2)))
INPUTS: list[Any] = [
    RouteInputs(torch.zeros((1, 4)), SPEC.routing),
    RouterSpec(SPEC.logits, SPEC.routing, 4, 8, torch.float32),
    LayerInputs(X, torch.zeros((1, 4)), SPEC, {"experts.w2": X}),
    ShardInputs(WHOLE, torch.arange(4)),
]


@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: type(inputs).__name__)
def test_a_field_that_is_gone_says_what_is_read_instead(inputs: Any) -> None:
    for name, instead in type(inputs).gone.items():
        with pytest.raises(AttributeError) as refused:
            getattr(inputs, name)
        assert f"{type(inputs).__name__}.{name} is gone since protocol 2; use {instead}" in str(refused.value)
        first, _, rest = instead.partition("[")
        value = inputs
        for part in first.split("."):
            value = getattr(value, part)
        assert not rest or isinstance(value, dict)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        _ = inputs.colour


def test_a_name_that_is_gone_says_what_is_imported_instead() -> None:
    for name in engine._GONE:
        with pytest.raises(ImportError, match=f"moe_conformance.engine.{name} is gone since protocol 2; use "):
            getattr(engine, name)


def test_the_page_has_every_word_that_changed() -> None:
    for (stage, word), now in aliases.WORDS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and f"| `{word}` |" in line)
        assert all(f"`{instead}`" in row for instead in now), (stage, word)


def test_every_name_of_the_page_is_behind_the_door() -> None:
    door = importlib.import_module("moe_conformance.engine")
    for name in ("RoutingSpec", "RouterSpec", "LogitsSpec", "LayerInputs", "ExpertsInputs", "Limits", "Target"):
        assert name in PAGE and hasattr(door, name)
