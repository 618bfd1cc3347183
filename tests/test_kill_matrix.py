"""Every mutant fails the case that is named for it, and nothing outside its class."""

from __future__ import annotations

import pytest
from every_check import CHECKS, modules, verdict
from torch import Tensor

import moe_conformance.engines.mutants
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.engine import STAGES, LayerInputs, Unsupported
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import MoEConformanceError
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running.discovery import Target

SEEDS = ("config-keys", "closure-capture", "double-prefix", "dp-assertions", "shape-mismatch")


MUTANTS: list[Mutant] = [
    mutant for module in modules(moe_conformance.engines.mutants, "") for mutant in getattr(module, "MUTANTS", ())
]


every_mutant = pytest.mark.parametrize(
    "mutant",
    [pytest.param(one, marks=[pytest.mark.nightly] * one.slow, id=one.engine.name) for one in MUTANTS],
)


def judge_of(mutant: Mutant) -> Judge:
    judge = Judge(Target(mutant.engine.name, f"{mutant.engine.__module__}:{mutant.engine.__qualname__}"))
    judge.adapters = judge.adapters[1:]  # a mutant's file is its engine, so what it raises is the engine's failure
    return judge


def assert_no_stranger_fails(mutant: Mutant, tier: str) -> None:
    """Cases of other classes on the stages that it overrides; elsewhere it is the reference."""
    judge, own = judge_of(mutant), {mutant.bug_class, *mutant.also}
    strangers = [row for row in CHECKS if row[2].stage in stages_of(mutant) and row[2].bug_class not in own]
    failed = [f"{row[2].id}: {row[1]}" for row in strangers if row[2].tier == tier and verdict(judge, *row).badness]
    assert failed == []


def is_a_slip(raised: BaseException | None) -> bool:
    """Whether it comes from a mistake in the mutant itself, which would fail whatever is asked."""
    slips = (ImportError, LookupError, NameError, TypeError, ValueError)
    return isinstance(raised, slips) and not isinstance(raised, MoEConformanceError)


def stages_of(mutant: Mutant) -> set[str]:
    return {stage for stage in STAGES if getattr(mutant.engine, stage) is not getattr(Reference, stage)}


@every_mutant
def test_a_mutant_fails_its_named_case_and_nothing_outside_its_class(mutant: Mutant) -> None:
    case_id, check = mutant.killed_by
    (named,) = (row for row in CHECKS if (row[2].id, row[1].removeprefix("test_")) == (case_id, check))
    assert named[2].bug_class == mutant.bug_class
    judge = judge_of(mutant)
    assert verdict(judge, *named) is (Verdict.FAIL if named[2].level == "MUST" else Verdict.BROKEN_SHOULD)
    assert not is_a_slip(judge.raised), f"it dies of its own code: {judge.raised!r}"
    assert named[2].stage in stages_of(mutant)
    assert_no_stranger_fails(mutant, "smoke")


@pytest.mark.nightly
@every_mutant
def test_a_mutant_fails_no_core_case_of_another_class(mutant: Mutant) -> None:
    assert_no_stranger_fails(mutant, "core")


class Slips(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        raise ValueError("want at least one keyword")


def test_a_mutant_that_dies_of_its_own_code_has_shown_no_fault() -> None:
    case, check = "layer-tiny-padded-hidden", "padding_never_reaches_the_output"
    with pytest.raises(AssertionError, match="dies of its own code"):
        test_a_mutant_fails_its_named_case_and_nothing_outside_its_class(
            Mutant(Slips, "shape-mismatch", "always raises", (case, check))
        )


class RefusesLayers(Faulty):
    def layer(self, inputs: LayerInputs) -> Tensor:
        raise Unsupported("no kernel for sm_35")


def test_a_fault_that_makes_an_engine_refuse_counts_as_missed() -> None:
    """Users would see an engine of which less is judged, and no red cell."""
    case, check = "layer-tiny-padded-hidden", "padding_never_reaches_the_output"
    with pytest.raises(AssertionError, match=r"UNSUPPORTED.* is .*FAIL"):
        test_a_mutant_fails_its_named_case_and_nothing_outside_its_class(
            Mutant(RefusesLayers, "shape-mismatch", "refuses every layer", (case, check))
        )


@pytest.mark.parametrize("bug_class", BUG_CLASSES)
def test_every_class_has_smoke_cases(bug_class: str) -> None:
    """But for what whole models alone show, which take longer than all of smoke."""
    cases = [case for _, _, case in CHECKS if case.bug_class == bug_class]
    assert any(case.tier == "smoke" for case in cases) or all(case.stage == "generate" for case in cases)


@pytest.mark.parametrize("bug_class", SEEDS)
def test_each_seed_has_its_fault_and_two_relatives(bug_class: str) -> None:
    assert sum(mutant.bug_class == bug_class for mutant in MUTANTS) >= 3


def test_mutants_have_names_of_their_own() -> None:
    names = [mutant.engine.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
