"""The table of features: complete for the catalogue, and declined by the reference nowhere."""

from __future__ import annotations

import pytest

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engines.reference import Reference
from moe_conformance.protocol.features import FEATURES, complaints, is_known
from moe_conformance.protocol.stages import STAGES


def test_the_reference_declares_what_it_may_and_declines_only_other_implementations() -> None:
    """Whatever a case needs that the reference does not offer would be judged on nobody."""
    offered = Reference().capabilities()
    declined = {
        (case.id, word)
        for case in catalogue().values()
        for word in case.needs - offered[case.stage]
        if not word.startswith("implementation:")
    }
    assert (declined, complaints(offered)) == (set(), [])


def test_the_reference_has_no_limits() -> None:
    assert Reference().limits() == {}


def test_a_word_stands_once_in_a_stage() -> None:
    pairs = [(stage, entry.word) for entry in FEATURES for stage in entry.stages]
    assert len(set(pairs)) == len(pairs) and {stage for stage, _ in pairs} <= set(STAGES)


@pytest.mark.parametrize(
    ("stage", "word", "known"),
    [
        ("block", "mixtral", True),
        ("block", "implementation:eager", True),
        ("block", "implementation:", False),
        ("block", "implementation:NAME", False),
        ("block", "MODEL_TYPE", False),
        ("route", "mixtral", False),
        ("route", "softmax", True),
        ("align", "softmax", False),
    ],
)
def test_a_word_in_capitals_stands_for_others(stage: str, word: str, known: bool) -> None:
    assert is_known(stage, word) is known
