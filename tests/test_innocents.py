"""No engine that does a legitimate thing in its own way is accused, and where it was, the case now clears it."""

from __future__ import annotations

from functools import cache

import pytest
from every_check import CHECKS, verdict
from innocents import ACCUSED as OF_STAGES
from innocents import Accused, SumsInAnyOrder
from innocents_of_answers import ACCUSED as OF_ANSWERS
from innocents_of_calls import ACCUSED as OF_CALLS

from moe_conformance.engine import STAGES
from moe_conformance.engines.reference import Reference
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running.discovery import Target

ACCUSED = (*OF_STAGES, *OF_CALLS, *OF_ANSWERS)
# Inputs of the default seed and of two others; every night of 20.
SEEDS = (0, 1, 2)
NIGHTLY_SEEDS = range(20)
# Hours of CPU: for the nightly job alone, not for a push to pass.
MANY = [pytest.mark.nightly, pytest.mark.sweep]


@cache
def judge_of(engine: type[Reference], seed: int = 0) -> Judge:
    judge = Judge(Target(engine.name, f"{engine.__module__}:{engine.__qualname__}"), seed)
    judge.adapters = judge.adapters[1:]  # an innocent's file is its engine, so what it raises is the engine's failure
    return judge


@pytest.mark.parametrize("accused", ACCUSED, ids=lambda accused: f"{accused.engine.name}-{accused.clause}")
def test_the_case_that_could_accuse_an_innocent_clears_it(accused: Accused) -> None:
    case_id, check = accused.cleared_by
    (named,) = (row for row in CHECKS if (row[2].id, row[1].removeprefix("test_")) == (case_id, check))
    assert named[2].clause == accused.clause
    assert verdict(judge_of(accused.engine), *named) is accused.verdict


@pytest.mark.parametrize(
    ("seed", "every"),
    [
        *(pytest.param(seed, False, id=f"smoke-seed{seed}") for seed in SEEDS),
        pytest.param(0, True, id="core-seed0", marks=pytest.mark.nightly),
        *(pytest.param(seed, True, id=f"core-seed{seed}", marks=MANY) for seed in NIGHTLY_SEEDS[1:]),
    ],
)
@pytest.mark.parametrize("engine", dict.fromkeys(accused.engine for accused in ACCUSED), ids=lambda engine: engine.name)
def test_an_innocent_passes_every_case_of_the_stages_that_it_does_its_own_way(
    engine: type[Reference], seed: int, every: bool
) -> None:
    stages = {stage for stage in STAGES if getattr(engine, stage) is not getattr(Reference, stage)}

    def judged(tier: str) -> dict[str, Verdict]:
        rows = [row for row in CHECKS if row[2].stage in stages and row[2].tier == tier]
        return {f"{row[2].id}: {row[1]}": verdict(judge_of(engine, seed), *row) for row in rows}

    found = judged("smoke")
    if every or Verdict.PASS not in found.values():  # nothing is cleared where nothing was judged
        found |= judged("core")
    assert Verdict.PASS in found.values()
    assert {name: verdict for name, verdict in found.items() if verdict.is_bad} == {}


@pytest.mark.parametrize(
    ("seed", "tiers"),
    [
        *(pytest.param(seed, ("smoke",), id=f"smoke-seed{seed}") for seed in SEEDS[1:]),
        *(pytest.param(seed, ("core", "full"), id=f"full-seed{seed}", marks=MANY) for seed in NIGHTLY_SEEDS[1:]),
    ],
)
def test_the_reference_passes_with_other_inputs(seed: int, tiers: tuple[str, ...]) -> None:
    judge = judge_of(Reference, seed)
    found = {f"{row[2].id}: {row[1]}": verdict(judge, *row) for row in CHECKS if row[2].tier in tiers}
    assert Verdict.PASS in found.values()
    assert {name: verdict for name, verdict in found.items() if verdict.is_bad} == {}


def test_sums_in_any_order_differ_from_call_to_call() -> None:
    """Offered "same_bits", that innocent is guilty: its case shows that it passes by the bound, not by luck."""
    judge = Judge(Target("claims-same-bits", f"{SumsInAnyOrder.__module__}:{SumsInAnyOrder.__qualname__}"))
    judge.engine.raw.lacks = {}
    (named,) = (row for row in CHECKS if row[2].id == "shard-nothing-of-others")
    assert verdict(judge, *named) is Verdict.FAIL
