"""Several copies of one expert: the same output wherever they lie."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.suites.shard.cases import REPLICAS
from moe_conformance.suites.shard.ranks import judge_sum, ranks, unsharded


@check(REPLICAS)
@torch.no_grad()
def test_copies_and_moves_leave_the_output(engine: Engine, case: Case) -> None:
    """Parts sum to the layer before and after the copies are rearranged."""
    layer = unsharded(case)
    for copies in case["copies"]:
        judge_sum(engine, f"sum of the ranks' parts with copies {copies}", layer, ranks(case, layer, copies))
