"""Ranks read x, ids, weights and matrices as they are given, or refuse them."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.shard.cases import ARGUMENTS
from moe_conformance.suites.shard.ranks import judge_sum, ranks, unsharded


@check(ARGUMENTS)
@torch.no_grad()
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """Parts sum to the layer; where they do not, the first argument to blame is named."""

    def judge(given: Any) -> None:
        layer = unsharded(case, given)
        judge_sum(engine, "sum of the ranks' parts", layer, ranks(case, layer))

    assert_honoured("shard", case["arguments"], judge)
