"""What all checks of experts do: call the engine, look at the form of its answer, compare it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import ExpertsInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.model.specs import MLPSpec
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.stored import WHOLE


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


def assert_beside_stored(engine: Any, case: Case, what: str) -> None:
    """The sum of stored experts is the exact one with `what` beside them, as it is with either alone."""
    stored = {**case.recipe, **WHOLE, "mlp": MLPSpec(WHOLE["F"]), "output_scale": 1.0, "dropped": 0}
    plain = {word: value for word, value in case.recipe.items() if word != "quant"}

    def judge(special: bool) -> None:
        for recipe in (case.recipe,) if special else (stored, plain):
            assert_sum(engine, inputs_of(replace(case, recipe=recipe)))

    assert_holds("experts", f"{case['quant'].format} weights and {what}", judge)
