"""Expert outputs are weighed, summed and scaled once each, for any number of tokens, experts and pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.repeats import assert_repeats
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.suites.experts.cases import SUM_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import answer, assert_sum


@check(SUM_CASES)
@torch.no_grad()
def test_outputs_are_weighed_and_summed(engine: Any, case: Case) -> None:
    """Weights of both signs that do not sum to 1, a scale, identity experts."""
    assert_sum(engine, inputs_of(case))


# Half a second each, interpreted, with hundreds of experts.
@check(case for case in SUM_CASES if case["T"] > 1 and case["D"] < 64 and case["E"] < 100)
@torch.no_grad()
def test_another_call_between_leaves_no_trace(engine: Any, case: Case) -> None:
    """A workspace that keeps something of one call shows in the next."""
    inputs = inputs_of(case)
    first = answer(engine, inputs).clone()
    answer(engine, replace(inputs, x=inputs.x.flip(0) * 3, ids=inputs.ids.flip(0)))
    bound = expected_experts(inputs)[1]
    assert_repeats("routed sum of the second run", engine, "experts", answer(engine, inputs), first, bound)
