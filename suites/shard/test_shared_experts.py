"""A shared expert on several ranks is in their sum once, replicated or divided as the engine likes."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.suites.shard.cases import SHARED
from moe_conformance.suites.shard.ranks import judge_sum, ranks, unsharded


@check(SHARED)
@torch.no_grad()
def test_shared_output_is_added_once(engine: Engine, case: Case) -> None:
    """Parts sum to the routed sum plus the shared expert's output."""
    layer = unsharded(case)
    judge_sum(engine, "sum of the ranks' parts", layer, ranks(case, layer))
