"""A call of experts is of its arguments alone, not of what was called before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import ExpertsInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import twice
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.suites.experts.cases import STATE_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import answer, assert_sum


def between(case: Case, changes: Mapping[str, Any]) -> ExpertsInputs:
    """Another layer, of other values: of the case's shape, but for what changes."""
    inputs = inputs_of(replace(case, recipe={**case.recipe, **changes}))
    tensors = {name: tensor.flip(0) for name, tensor in inputs.tensors.items()}
    return replace(inputs, x=inputs.x.flip(0) * 3, ids=inputs.ids.flip(0), tensors=tensors)


@check(STATE_CASES)
@torch.no_grad()
def test_another_call_between_leaves_no_trace(engine: Any, case: Case) -> None:
    """A call, others, the call again; and another layer of the same shape is not taken for the first."""
    inputs = inputs_of(case)
    first = answer(engine, inputs).clone()
    want, bound = expected_experts(inputs)
    for changes in case["between"]:
        other = between(case, changes)
        try:
            if changes or not compare.is_close(first, want, bound):
                answer(engine, other, "routed sum of another call")
            else:
                assert_sum(engine, other)
        except Nonconformance as error:
            raise Nonconformance(f"after another call, with {dict(changes) or 'other values'}: {error}") from error
        except Exception:
            continue  # what another call raises is for cases of its own
    again, what = answer(engine, inputs), "routed sum of the same call again, against the first"
    if case.level == "SHOULD":
        compare.equal(what, again, first)
    else:
        compare.close(what, again, first, twice(bound))
