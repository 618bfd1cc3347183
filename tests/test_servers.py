"""What the adapters of servers read of a model's modules."""

from __future__ import annotations

import pytest
from torch import nn

from moe_conformance.engines.servers import one_or_each, shared_experts


class Down(nn.Module):
    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size


def layer(name: str, down: str, width: int) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({name: nn.ModuleDict({down: Down(width)})})})


@pytest.mark.parametrize(
    ("name", "down", "width", "found"),
    [
        ("shared_experts", "down_proj", 48, (3, 48)),
        ("shared_experts", "down_proj", 40, (1, 40)),  # no whole number of routed ones
        ("shared_expert", "down_proj", 48, (1, 48)),
        ("shared_mlp", "output_linear", 32, (1, 32)),
        ("experts", "down_proj", 48, (0, None)),
        ("shared_experts", "up_proj", 48, (0, None)),
    ],
)
def test_shared_experts_are_counted_by_the_width_of_a_routed_one(
    name: str, down: str, width: int, found: tuple[int, int | None]
) -> None:
    assert shared_experts(layer(name, down, width), 16) == found


def test_what_all_layers_have_is_said_once() -> None:
    assert one_or_each([8, 8, 8]) == 8
    assert one_or_each([8, 4, 8]) == (8, 4, 8)
