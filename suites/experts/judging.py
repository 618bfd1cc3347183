"""What all checks of experts do: call the engine, look at the form of its answer, compare it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_conformance.engine import ExpertsInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.protocol.moving import to_device


def answer(engine: Any, inputs: ExpertsInputs, what: str = "routed sum") -> Tensor:
    """The engine's sum [T, D] in x's dtype; every fresh allocation is poisoned."""
    with poisoned_allocations():
        got: Tensor = engine.experts(to_device(inputs, engine.info.device))
    compare.shape_and_type(what, got, inputs.x.shape, integer=False)
    compare.same(f"{what}, dtype", str(got.dtype), str(inputs.x.dtype))
    return got


def assert_sum(engine: Any, inputs: ExpertsInputs) -> None:
    """The engine's sum is the exact one within what storing in x's dtype may cost."""
    got = answer(engine, inputs)
    want, bound = expected_experts(inputs)
    compare.close("routed sum", got, want, bound)
