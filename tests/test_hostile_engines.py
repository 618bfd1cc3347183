"""Whatever an engine does in a call, its case comes to what it should, and the next one is judged as ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_processes
import test_surveys
import torch
from hostile_library import ENDING, KINDS, STATE, Kind

from moe_conformance.catalogue.case import catalogue
from moe_conformance.judging import state
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.running import process as process_module
from moe_conformance.running.discovery import Target
from moe_conformance.running.process import Allowed, EngineProcess
from moe_conformance.running.survey import Survey

CASE = catalogue()["layer-tiny-padded-hidden"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """In one process, as far as no kind ends it."""
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    process = EngineProcess(Target("hostile", "hostile_engines:Hostile"), Survey(), Allowed(3.0), environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_module, "SOON", 20.0)  # that one which cannot answer takes to end, on a busy machine
        patch.chdir(tmp_path_factory.mktemp("hostile"))
        yield process
        process.close()


def judged(engine: EngineProcess, kind: str) -> Outcome:
    """By a check that tells the engine which kind it is to be; "right" is none."""
    check: Callable[..., Any] = SimpleNamespace(__name__=kind)  # type: ignore[assignment]
    return engine.run("hostile_engines", check, CASE)


def assert_judged(engine: EngineProcess, name: str, kind: Kind) -> None:
    outcome = judged(engine, name)
    assert outcome.verdict == kind.verdict and kind.words in outcome.message, outcome
    end = time.monotonic() + 5 * bool(kind.later)
    while (later := engine.after_the_last()) is None and time.monotonic() < end:
        time.sleep(0.02)
    assert (later.verdict if later else "") == kind.later, later
    assert (judged(engine, "right").verdict, judged(engine, "is_wrong").verdict) == (Verdict.PASS, Verdict.FAIL)


def test_the_next_case_is_judged_as_if_nothing_had_been(engine: EngineProcess) -> None:
    for name, kind in KINDS.items():
        child = engine._child
        assert_judged(engine, name, kind)
        assert child in (None, engine._child), f"{name} cost the process"


def test_what_a_call_changes_of_the_process_is_as_it_was() -> None:
    before = [ask() for ask, _ in state._STATE]
    with state.kept():
        for name in STATE:
            KINDS[name].act(None, lambda inputs: torch.empty(0))
        changed = [ask() for ask, _ in state._STATE]
    assert all(was != now for was, now in zip(before, changed, strict=True))
    assert [ask() for ask, _ in state._STATE] == before


@pytest.mark.nightly
@pytest.mark.parametrize("name", ENDING)
def test_what_ends_the_process_costs_its_case_alone(engine: EngineProcess, name: str) -> None:
    assert_judged(engine, name, ENDING[name])


def test_the_tables_have_many_kinds() -> None:
    """Of what adapters do when they are imported, processes with a question, and engines in a call."""
    tables = (test_surveys.HOSTILE, test_surveys.HARMLESS, test_processes.ACTS, KINDS, ENDING)
    names = {name.replace("-", "_") for table in tables for name in table}
    assert len(names) + len(test_processes.DOES) >= 130
