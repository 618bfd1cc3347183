"""Pairs that no expert here computes: the id one beyond all experts, and ids that name none."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Routing
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.block.blocks import inputs_of, spec_of
from moe_conformance.suites.block.cases import DROPPED_CASES, NO_EXPERT_CASES
from moe_conformance.suites.block.expected import Exact
from moe_conformance.suites.block.judging import answer, judge_output


@check(DROPPED_CASES)
def test_a_dropped_pair_adds_nothing(engine: Any, case: Case) -> None:
    """A third of the pairs has id E and weight 0: the output is that of the other pairs."""
    judge_output(engine, case)


@check(NO_EXPERT_CASES)
@torch.no_grad()
def test_an_id_of_no_expert_is_refused_or_adds_nothing(engine: Any, case: Case) -> None:
    """A third of the pairs has id -1, and a weight: never the last expert's output, nor anything of its neighbours."""
    inputs, spec = inputs_of(case), spec_of(case["family"])
    assert inputs.routing is not None
    try:
        got = answer(engine, inputs)
    except (Nonconformance, Unsupported):
        raise
    except Exception:
        return  # refused, in whatever words
    ids, weights = inputs.routing
    dropped = spec.num_experts + spec.routing.identity_experts
    want, bound = Exact(inputs, spec).output(Routing(ids.masked_fill(ids < 0, dropped), weights))
    compare.close("block output", got.output, want, bound)
