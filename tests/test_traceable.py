"""Every clause has cases and a mutant that they kill, and so has every check under each of its clauses."""

from __future__ import annotations

from collections import Counter

from every_check import CHECKS
from test_kill_matrix import MUTANTS

from moe_conformance.catalogue.clauses import BUG_CLASSES, CLAUSES

CLAUSE_OF = {case.id: case.clause for _, _, case in CHECKS}
KILLED = {(mutant.killed_by[1], CLAUSE_OF[mutant.killed_by[0]]) for mutant in MUTANTS}


def test_every_clause_has_cases() -> None:
    assert CLAUSES.keys() - CLAUSE_OF.values() == set()


def test_every_clause_says_whom_its_breach_has_cost() -> None:
    """A thread where an engine broke it, or where it comes from."""
    assert [name for name, clause in CLAUSES.items() if not (clause.upstream or clause.origin)] == []


def test_every_check_kills_a_mutant_under_each_of_its_clauses() -> None:
    checks = {(name.removeprefix("test_"), case.clause) for _, name, case in CHECKS}
    assert checks - KILLED == set()


def test_every_class_has_four_mutants() -> None:
    count = Counter(mutant.bug_class for mutant in MUTANTS)
    few = [f"{bug_class} has {count[bug_class]}, want 4" for bug_class in BUG_CLASSES if count[bug_class] < 4]
    assert few == []
