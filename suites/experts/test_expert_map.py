"""Pairs without an expert here add exactly nothing, and ids that name no expert never become one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.repeats import assert_repeats
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.suites.experts.cases import NO_EXPERT_CASES, OUTSIDE_CASES
from moe_conformance.suites.experts.inputs import held_pairs, inputs_of
from moe_conformance.suites.experts.judging import answer, assert_beside_stored, assert_sum
from moe_conformance.suites.experts.stored import STORED_NO_EXPERT_CASES


@check(NO_EXPERT_CASES)
@torch.no_grad()
def test_pairs_of_no_expert_here_add_nothing(engine: Any, case: Case) -> None:
    """The sum is that of the other pairs; NaN as weights, and as tokens without any expert, change no bit of it."""
    inputs = inputs_of(case)
    assert_sum(engine, inputs)
    first, held = answer(engine, inputs), held_pairs(inputs)
    nan = float("nan")
    poisoned = replace(
        inputs,
        x=inputs.x.masked_fill(~held.any(-1, keepdim=True), nan),
        weights=inputs.weights.masked_fill(~held, nan),
    )
    what = "routed sum with NaN where nobody looks"
    second = answer(engine, poisoned, what)
    assert_repeats(what, engine, "experts", second, first, expected_experts(inputs)[1])
    idle = second.cpu()[~held.any(-1)]
    compare.equal("routed sum of tokens without an expert here", idle, torch.zeros_like(idle))


@check(STORED_NO_EXPERT_CASES)
@torch.no_grad()
def test_pairs_of_no_expert_add_nothing_to_stored_experts(engine: Any, case: Case) -> None:
    """With stored weights, too: a kernel of a format may have its own way with ids of -1, or none."""
    assert_beside_stored(engine, case, "pairs without an expert")


@check(OUTSIDE_CASES)
@torch.no_grad()
def test_ids_out_of_range_never_name_an_expert(engine: Any, case: Case) -> None:
    """A batch with an id outside [0, E), handed on as it is, raises or is summed without that pair."""
    inputs = inputs_of(case)
    outside = inputs.ids.clone()
    outside[0, 1] = outside[3, 0] = case["outside"]
    try:
        got = answer(engine, replace(inputs, ids=outside, native_ids=True))
    except (Unsupported, Nonconformance):
        raise
    except Exception:
        return  # refused, in whatever words
    dropped = inputs.ids.clone()
    dropped[0, 1] = dropped[3, 0] = -1
    want, bound = expected_experts(replace(inputs, ids=dropped))
    compare.close(f"routed sum with ids of {case['outside']}, against pairs that are not there", got, want, bound)
