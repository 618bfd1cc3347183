"""Several copies of one expert: each pair goes to a copy of its own, and is counted once."""

from __future__ import annotations

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, ReplicateInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.replicate.cases import REPLICATE
from moe_conformance.suites.shard.ranks import chosen


def _inputs(case: Case, engine: Engine) -> ReplicateInputs:
    rows, device = case["T"] + case["padding"], engine.info.device
    ids = chosen(rows, case["E"], case["K"], case["dropped"], "replicate").to(device)
    return ReplicateInputs(ids, torch.tensor(case["copies"], device=device), case["E"], case["T"])


@check(case for case in REPLICATE if case.clause == "replicate.choice")
def test_each_pair_goes_to_a_copy_of_its_expert(engine: Engine, case: Case) -> None:
    """Physical ids name the experts that the logical ids do, and -1 where they are -1."""
    inputs = _inputs(case, engine)
    got = compare.numbers("physical ids", engine.replicate(inputs).ids, inputs.ids.shape, integer=True)
    got, ids = got[: case["T"]].long(), inputs.ids[: case["T"]].cpu()
    outside = (got < -1) | (got >= len(case["copies"]))
    if outside.any():
        raise Nonconformance(f"physical ids: got {got[outside][0]}, want -1 or 0 to {len(case['copies']) - 1}")
    named = torch.where(got < 0, -1, inputs.physical_to_logical.cpu()[got.clamp(min=0)])
    compare.equal("experts that the physical ids are copies of", named, ids)


@check(case for case in REPLICATE if case.clause == "replicate.load")
def test_load_counts_real_pairs_by_logical_expert(engine: Engine, case: Case) -> None:
    """As many pairs as the real rows have ids; copies, padding and ids of -1 add none."""
    inputs = _inputs(case, engine)
    real = inputs.ids[: case["T"]].flatten().tolist()
    want = torch.tensor([real.count(expert) for expert in range(case["E"])])
    compare.equal("load", engine.replicate(inputs).load, want)
