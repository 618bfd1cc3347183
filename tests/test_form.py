"""What a stage's answer must look like is said before anything is judged, in the protocol's own words."""

from __future__ import annotations

import inspect

import pytest
from test_cli import invoke

from moe_conformance import engine
from moe_conformance.catalogue.case import catalogue, in_tier
from moe_conformance.engine import Engine
from moe_conformance.protocol.form import form
from moe_conformance.protocol.stages import STAGES

RUN = ["run", "--engine", "reference", "-n", "0", "--collect-only", "--stage", "align"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_told_in_the_words_of_its_docstrings(stage: str) -> None:
    told = form([stage])
    assert f"{stage}(" in told and f"moe-conformance features {stage}" in told
    signature = inspect.signature(getattr(Engine, stage))
    types = [item.annotation for item in signature.parameters.values() if item.name != "self"]
    words = [inspect.getdoc(getattr(Engine, stage)) or ""]
    words += [
        inspect.cleandoc(getattr(engine, name).__doc__ or "")
        for name in [*types, signature.return_annotation]
        if name in engine.__all__
    ]
    lines = [line for text in words for line in text.splitlines() if line]
    assert lines and not [line for line in lines if line not in told]


def test_a_capturers_methods_are_told_with_their_rows() -> None:
    told = form(["capture_session"])
    assert "capture(layer_id: int, ids: Tensor, rows: Rows) -> None" in told
    assert "valid_rows: how many leading rows" in told


def test_each_type_is_told_once() -> None:
    assert form(["route", "layer", "capture_session", "capture_store"]).count("  CaptureSpec(") == 1


def test_the_form_comes_before_anything_is_judged() -> None:
    code, said = invoke(*RUN, "--tier", "smoke")
    assert code == 0
    assert said.startswith("letters: T tokens,") and said.index("slot_to_pair (") < said.index("test_permutation.py")
    assert "slot_to_pair (" not in invoke(*RUN)[1]


def test_a_run_of_a_stage_has_its_cases_alone() -> None:
    code, said = invoke(*RUN, "--tier", "smoke")
    want = {case.id for case in catalogue().values() if case.stage == "align" and in_tier(case, "smoke")}
    got = {line.partition("[reference-")[2].rstrip("]") for line in said.splitlines() if "[reference-" in line}
    assert (code, got) == (0, want)
    assert "did you mean 'align'?" in invoke("run", "--stage", "algin")[1]
