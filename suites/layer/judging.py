"""What all checks of layers do: call the engine, look at the form of its answer, compare it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_conformance.engine import LayerInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.oracle.layer import expected_layer
from moe_conformance.protocol.moving import to_device


def answer(engine: Any, inputs: LayerInputs, what: str = "layer output") -> Tensor:
    """The engine's output [T, H] in x's dtype; every fresh allocation is poisoned."""
    with poisoned_allocations():
        got: Tensor = engine.layer(to_device(inputs, engine.info.device))
    compare.shape_and_type(what, got, inputs.x.shape, integer=False)
    compare.same(f"{what}'s dtype", str(got.dtype), str(inputs.x.dtype))
    return got


def assert_output(engine: Any, inputs: LayerInputs) -> Tensor:
    """The engine's output is the exact one within what storing in x's dtype may cost."""
    got = answer(engine, inputs)
    want, bound = expected_layer(inputs)
    compare.close("layer output", got, want, bound)
    return got
