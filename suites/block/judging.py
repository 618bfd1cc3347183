"""What all checks of blocks do: run the engine, look at the form of its answer, compare the output."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import BlockInputs, BlockOutput
from moe_conformance.judging import compare
from moe_conformance.suites.block.blocks import inputs_of, on, spec_of
from moe_conformance.suites.block.expected import Exact


def answer(engine: Any, inputs: BlockInputs) -> BlockOutput:
    """The engine's answer, its output [T, H] in x's dtype."""
    got: BlockOutput = engine.block(on(inputs, engine.info.device))
    rows, hidden = inputs.x.shape[0] * inputs.x.shape[1], inputs.x.shape[2]
    compare.shape_and_type("block output", got.output, (rows, hidden), integer=False)
    compare.same("block output's dtype", str(got.output.dtype), str(inputs.x.dtype))
    return got


@torch.no_grad()
def judge_output(engine: Any, case: Case) -> None:
    """The output is that of the reference in float64, within what storing in x's dtype may cost.

    At the routing that the engine reports: whether that is the model's is for the routing check of the same family.
    """
    inputs = inputs_of(case)
    got = answer(engine, inputs)
    want, bound = Exact(inputs, spec_of(case["family"])).output(inputs.routing or got.routing)
    compare.close("block output", got.output, want, bound)
