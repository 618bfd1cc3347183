"""Golden files and the catalogue agree in both directions."""

from __future__ import annotations

from moe_conformance.catalogue.case import catalogue, checks
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.judging.goldens import FOLDER, recorded

# But for whole models, which are inputs, too, and have a test of their own.
FILES = sorted(
    path
    for path in FOLDER.rglob("*")
    if path.is_file() and path.suffix != ".py" and not {"__pycache__", "whole-models"} & set(path.parts)
)


def test_every_golden_file_belongs_to_a_check() -> None:
    named = {name for by_check in checks().values() for name in by_check}
    strangers = [path for path in FILES if path.stem not in named or path.parent.name not in BUG_CLASSES]
    assert strangers == []


def test_every_snapshot_belongs_to_a_case_of_its_class_and_check() -> None:
    for path in FILES:
        for case_id in recorded(path.parent.name, path.stem):
            assert case_id in catalogue(), f"{path}: no case is called {case_id}"
            assert catalogue()[case_id].bug_class == path.parent.name
            assert path.stem in checks()[case_id]


def test_a_check_with_a_golden_has_one_for_each_of_its_cases() -> None:
    for path in FILES:
        expected = {case_id for case_id, named in checks().items() if path.stem in named}
        ours = {case_id for case_id in expected if catalogue()[case_id].bug_class == path.parent.name}
        assert ours - recorded(path.parent.name, path.stem).keys() == set(), path


def test_each_seed_class_has_goldens() -> None:
    seeds = {"config-keys", "closure-capture", "double-prefix", "dp-assertions", "shape-mismatch"}
    assert seeds <= {path.parent.name for path in FILES}
