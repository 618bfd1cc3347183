"""Each expert lies on one rank, and ranks hold as many."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, ExpertMapSpec
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.expert_map.cases import PLACES


@check(PLACES)
def test_every_expert_has_one_place(engine: Engine, case: Case) -> None:
    """The maps of all ranks together number every expert once, contiguous in runs, round robin in turns."""
    experts, size, placement = case["experts"], case["ranks"], case["placement"]
    held = []
    for rank in range(size):
        what = f"map of rank {rank}"
        found = compare.numbers(
            what, engine.expert_map(ExpertMapSpec(experts, rank, size, placement)), (experts,), integer=True
        )
        mine = found >= 0
        compare.equal(f"{what}, entries of others", found[~mine], torch.full_like(found[~mine], -1))
        compare.equal(f"{what}, local ids", found[mine], torch.arange(int(mine.sum())))
        held.append(mine)
    compare.equal("ranks that hold each expert", torch.stack(held).sum(0), torch.ones(experts))
    owner = torch.stack(held).long().argmax(0)
    want = torch.arange(experts) % size if placement == "round_robin" else owner.sort().values
    compare.equal("rank of each expert", owner, want)
    sizes = [int(mine.sum()) for mine in held]
    if max(sizes) - min(sizes) > 1:
        raise Nonconformance(f"experts of each rank: got {sizes}, want sizes that differ by at most 1")
