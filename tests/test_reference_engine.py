"""The reference as an engine: it offers everything that any case may ask for."""

from __future__ import annotations

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engines.reference import Reference
from moe_conformance.model.families.families import RECORDS
from moe_conformance.protocol.features import complaints, words
from moe_conformance.protocol.stages import STAGES

OFFERED = Reference().capabilities()


def test_every_feature_of_every_stage_is_offered() -> None:
    assert complaints(OFFERED) == []
    assert list(OFFERED) == list(STAGES)
    for stage in STAGES:
        stand_ins = {"MODEL_TYPE", "implementation:NAME"}
        assert words(stage).keys() - OFFERED[stage] <= stand_ins, stage
    assert set(RECORDS) <= OFFERED["block"]


def test_no_case_asks_for_what_the_reference_does_not_offer() -> None:
    """But for experts computed by another implementation, which it has none of."""
    for case in catalogue().values():
        lacking = case.needs - OFFERED[case.stage]
        assert all(word.startswith("implementation:") for word in lacking), (case.id, lacking)


def test_it_has_no_limits() -> None:
    assert Reference().limits() == {}
