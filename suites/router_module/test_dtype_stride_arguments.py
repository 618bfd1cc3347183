"""Routers read hidden states as they are given, or refuse them."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.router_module.cases import ARGUMENT_CASES
from moe_conformance.suites.router_module.routers import RealRouter, judge_router


@check(ARGUMENT_CASES)
@torch.no_grad()
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """Ids and weights are those of the values, wherever in memory they lie; a router of logits gets logits as usual."""
    assert_honoured("router_module", case["arguments"], lambda given: judge_router(engine, RealRouter(case, given)))
