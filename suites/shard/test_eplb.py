"""Several copies of one expert: the same output wherever they lie, each pair on a copy of its own, counted once."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, ReplicateInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.parallel.cases import REPLICAS, REPLICATE
from moe_conformance.suites.parallel.ranks import chosen, expected, parts_sum, ranks, whole


@check(REPLICAS)
@torch.no_grad()
def test_copies_and_moves_leave_the_output(engine: Engine, case: Case) -> None:
    """Parts sum to the layer before and after the copies are rearranged."""
    layer = whole(case)
    for copies in case["copies"]:
        everybody = ranks(case, layer, copies)
        want, bound = expected(layer, everybody[0].ep_size, case["tp"])
        compare.close(f"sum of the ranks' parts with copies {copies}", parts_sum(engine, everybody), want, bound)
