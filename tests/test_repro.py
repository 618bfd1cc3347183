"""`moe-conformance repro`: what it writes shows the fault, for every mutant of the stages that it knows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_check import CHECKS
from test_kill_matrix import MUTANTS, Mutant
from torch import Tensor

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engine import ExpertsInputs, Repro
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import UsageError
from moe_conformance.repro.command import write
from moe_conformance.repro.record import record
from moe_conformance.repro.wanted import STAGES
from moe_conformance.running.discovery import Target

TESTS = Path(__file__).parent
# Faults that no answer has by itself: two that differ, a tie of groups, a slot of fused shared experts, a trace.
SEVERAL = {
    "leftovers-without-adapter": "routed sum of tokens without an adapter",
    "ties-go-either-way": "ids of the second run against the first",
    "tied-groups-all-kept": "4 of 8 groups kept",
    "shared-slot-is-scaled": "of shared expert 0",
    "shared-slot-is-expert-zero": "ids of shared experts",
    "graph-breaks": "fullgraph=True",
    "every-other-call-in-double": "of the same call again",
    "every-other-layer-in-double": "of the same call again",
    "idle-rank-unwritten": "never written",
}
# Classes of faults in the numbers of one answer; what others are about may take two.
OF_ONE = {
    "activation",
    "combine-algebra",
    "expert-map",
    "router-precision",
    "routing-semantics",
    "shape-mismatch",
    "shared-experts",
    "weight-orientation",
}
SWEEP = [pytest.mark.nightly, pytest.mark.sweep]
CASES = catalogue()
MINE = [mutant for mutant in MUTANTS if CASES[mutant.killed_by[0]].stage in STAGES]
SHOWN = [mutant for mutant in MINE if mutant.bug_class in OF_ONE and mutant.engine.name not in SEVERAL]


def run(text: str) -> str:
    """What the script ends with; empty where the fault is not there."""
    before, path = torch.are_deterministic_algorithms_enabled(), list(sys.path)
    try:
        exec(compile(text, "repro", "exec"), {"__name__": "__main__"})
        return ""
    except SystemExit as end:
        return str(end)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.use_deterministic_algorithms(before)
        sys.path[:] = path


def shown(engine: Any, case: str, file: Path, seed: int = 0) -> str:
    """What the script of this engine's fault ends with, with the calls before where they are needed."""
    target = Target(engine.name, f"{engine.__module__}:{engine.__qualname__}")
    for earlier in (False, True):
        if why := record(target, CASES[case], seed, file, {}, earlier):
            return f"not shown: {why}"
        if said := run(file.read_text()):
            return said
    return "not shown: passes by itself"


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if n % 16 == 0 else SWEEP) for n, m in enumerate(SHOWN)],
    ids=lambda mutant: mutant.engine.name,
)
def test_the_script_of_a_mutant_shows_its_fault(mutant: Mutant, tmp_path: Path) -> None:
    said = shown(mutant.engine, mutant.killed_by[0], tmp_path / "repro.py")
    assert said and not said.startswith("not shown"), said


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if m.engine.name == "ties-go-either-way" else SWEEP) for m in MINE if m not in SHOWN],
    ids=lambda mutant: mutant.engine.name,
)
def test_what_no_single_call_shows_is_said(mutant: Mutant, tmp_path: Path) -> None:
    said = shown(mutant.engine, mutant.killed_by[0], tmp_path / "repro.py")
    if mutant.engine.name in SEVERAL or said.startswith("not shown"):
        assert said.startswith("not shown: no single call")
        assert SEVERAL.get(mutant.engine.name, ": fail: ") in said


def test_a_correct_engines_calls_have_nothing_to_show(tmp_path: Path) -> None:
    for case in ("experts-ep3-dropped-rank1", "shard-ep3-scattered", "layer-tiny-plain", "route-plain-padding-rows"):
        assert shown(Reference, case, tmp_path / "repro.py").startswith("not shown: no single call"), case


class SaysHow(Reference):
    """An engine that forgets the last expert, and has the door."""

    name = "says-how"

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return first_expert(inputs.x, inputs.ids, inputs.tensors["experts.w2"])

    def repro(self, inputs: Any) -> Repro:
        source = "weights = t['w2']\ngot = t['x'] * 0 + weights[0, 0, 0] + t['ids'][:, :1]"
        return Repro(source, {"x": inputs.x, "ids": inputs.ids, "w2": inputs.tensors["experts.w2"]})


def first_expert(x: Tensor, ids: Tensor, w2: Tensor) -> Tensor:
    return x * 0 + w2[0, 0, 0] + ids[:, :1]


class SaysAnother(SaysHow):
    """Its door is not what it does."""

    name = "says-another"

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(inputs) + 1


def test_an_engine_with_a_door_is_shown_without_this_package(tmp_path: Path) -> None:
    file = tmp_path / "repro.py"
    assert "elements of rows" in shown(SaysHow, "experts-tiny-silu", file)
    text = file.read_text()
    assert "import moe_conformance" not in text and "from moe_conformance" not in text
    assert "fine((33, 20), 'experts-x'" in text  # drawn again, not written out


def test_a_door_that_does_something_else_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "repro.py"
    assert "elements of rows" in shown(SaysAnother, "experts-tiny-silu", file)
    assert "SaysAnother()" in file.read_text()


class SecondCallIsWrong(Reference):
    """Its buffer keeps something of the call before."""

    name = "second-call-is-wrong"
    calls = 0

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        type(self).calls += 1
        return super().experts(inputs) + (type(self).calls > 1)


def test_the_calls_before_are_made_where_the_fault_needs_them(tmp_path: Path) -> None:
    target = Target(SecondCallIsWrong.name, f"{__name__}:SecondCallIsWrong")
    file = tmp_path / "repro.py"
    case = next(case for _, name, case in CHECKS if name == "test_another_call_between_leaves_no_trace")
    SecondCallIsWrong.calls = 0
    assert record(target, case, 0, file, {}, earlier=False) == ""
    SecondCallIsWrong.calls = 0
    assert run(file.read_text()) == ""
    SecondCallIsWrong.calls = 0
    assert record(target, case, 0, file, {}, earlier=True) == ""
    SecondCallIsWrong.calls = 0
    assert "elements of rows" in run(file.read_text())


@pytest.mark.nightly
def test_the_command_writes_a_script_of_an_adapter_that_is_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    """With the run's seed; run once more by itself, it says the same."""
    folder = tmp_path / "my adapters"
    folder.mkdir()
    imported = "from moe_conformance.engines.mutants.experts import ScaleTwice"
    text = f"{imported}\n\n\nclass Mine(ScaleTwice):\n    name = 'mine'\n"
    (folder / "wrong.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    said = write("my adapters/wrong.py:Mine", "experts-scale", 3, tmp_path / "repro.py")
    assert re.match(r"60 of 60 elements of rows \[0, 1, 2\] differ, first \[0, 0\]: got ", said)
    assert "seed 3" in (tmp_path / "repro.py").read_text()
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "repro.py"], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.strip() == said


@pytest.mark.nightly
def test_an_engine_that_dies_is_shown_by_the_call_that_it_died_of(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    said = write("fake_engines:Crashes", "layer-tiny-latent", 0, tmp_path / "repro.py")
    assert said == "by SIGSEGV"


@pytest.mark.nightly
def test_what_cannot_be_shown_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="want one of route, experts, layer, shard"):
        write("reference", "config-qwen3-moe", 0, tmp_path / "repro.py")
