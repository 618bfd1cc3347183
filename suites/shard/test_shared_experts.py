"""A shared expert on several ranks is in their sum once, replicated or divided as the engine likes."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.judging import compare
from moe_conformance.suites.parallel.cases import SHARED
from moe_conformance.suites.parallel.ranks import expected, parts_sum, ranks, whole


@check(SHARED)
@torch.no_grad()
def test_shared_output_is_added_once(engine: Engine, case: Case) -> None:
    """Parts sum to the routed sum plus the shared expert's output."""
    layer = whole(case)
    everybody = ranks(case, layer)
    want, bound = expected(layer, everybody[0].ep_size, case["tp"])
    compare.close("sum of the ranks' parts", parts_sum(engine, everybody), want, bound)
