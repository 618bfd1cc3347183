"""Pairs that no expert here computes: said in the engine's own way, and ids of none as they are."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.oracle.layer import expected_block
from moe_conformance.suites.block.blocks import inputs_of
from moe_conformance.suites.block.cases import DROPPED_CASES, NO_EXPERT_CASES
from moe_conformance.suites.block.configs import spec_of
from moe_conformance.suites.block.judging import answer, judge_output


@check(DROPPED_CASES)
def test_a_dropped_pair_adds_nothing(engine: Any, case: Case) -> None:
    """A third of the pairs has no expert: the output is that of the other pairs."""
    judge_output(engine, case)


@check(NO_EXPERT_CASES)
@torch.no_grad()
def test_an_id_of_no_expert_is_refused_or_adds_nothing(engine: Any, case: Case) -> None:
    """A third of the pairs has id -1, or E, as it is, and a weight: never the last expert's output, nor anything of its
    neighbours."""
    inputs = inputs_of(case)
    try:
        got = answer(engine, inputs)
    except (Nonconformance, Unsupported):
        raise
    except Exception:
        return  # refused, in whatever words
    want, bound = expected_block(inputs, spec_of(case["family"]), inputs.routing)
    compare.close("block output", got.output, want, bound)
