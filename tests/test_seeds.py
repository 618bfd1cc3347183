"""--seed N draws every hashed input anew; what is undecided is drawn again; a rerun line leads back to the failure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_check import CHECKS
from test_kill_matrix import MUTANTS, Mutant
from test_tables import result

from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.engine import Engine
from moe_conformance.errors import Undecided, UsageError
from moe_conformance.judging.draws import ATTEMPTS, Draw, drawing
from moe_conformance.judging.goldens import matches, recorded
from moe_conformance.judging.inputs import bits
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Refusal, Verdict, at_level
from moe_conformance.reporting.explain import failure, rerun
from moe_conformance.reporting.faults import command
from moe_conformance.running.discovery import Target, resolve

TESTS = Path(__file__).parent
CASE, CHECK = "layer-tiny-padded-hidden", "padding_never_reaches_the_output"
ASKED = ["fake_engines:AlwaysWrong", str(TESTS / "fake_engines.py") + ":AlwaysWrong", "my adapters/wrong.py:Mine"]


def reference(seed: int = 0) -> Judge:
    return Judge(Target("reference", "moe_conformance.engines.reference:Reference"), seed)


def drawn(seed: int, attempt: int = 0) -> torch.Tensor:
    with drawing(Draw.of(seed, attempt)):
        return bits((64,), "x")


def test_each_seed_and_each_attempt_has_inputs_of_its_own() -> None:
    assert drawn(0).equal(bits((64,), "x")) and drawn(3).equal(drawn(3))
    streams = [drawn(0), drawn(1), drawn(11), drawn(0, 1), drawn(1, 1), drawn(0, 11)]
    assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)


def test_inputs_that_the_oracle_cannot_decide_are_drawn_again() -> None:
    seen = []

    def check(engine: Engine, case: Case) -> list[int]:
        seen.append(bits((1,), "x").item())
        if len(seen) < 3:
            raise Undecided("inputs are no good")
        return [1]

    outcome = reference().judge(check, catalogue()[CASE])
    assert (outcome.verdict, outcome.facts) == (Verdict.PASS, None)  # the golden is of the first draw
    assert len(set(seen)) == 3


def test_inputs_that_are_never_decided_are_no_fault_of_the_engine() -> None:
    def check(engine: Engine, case: Case) -> None:
        raise Undecided("inputs are no good: row 3")

    outcome = reference().judge(check, catalogue()[CASE])
    assert outcome.verdict is Verdict.ERROR
    assert outcome.message == f"inputs are no good: row 3; so they were in {ATTEMPTS} draws"


def test_goldens_are_asked_of_what_no_seed_changes() -> None:
    def draws_nothing(engine: Engine, case: Case) -> list[int]:
        return [1]

    def draws(engine: Engine, case: Case) -> list[int]:
        return [int(bits((1,), "x"))]

    facts = [
        reference(seed).judge(check, catalogue()[CASE]).facts for check in (draws_nothing, draws) for seed in (0, 1)
    ]
    assert facts == [[1], [1], [int(bits((1,), "x"))], None]


def test_an_answer_that_is_written_down_is_not_judged_with_other_inputs() -> None:
    (case,) = [case for case in catalogue().values() if case.stage == "generate"][:1]
    module, name, _ = next(row for row in CHECKS if row[2] is case)
    judge = reference(1)
    judge.capabilities = {"generate": case.needs}
    outcome = judge.run(module, name, case)
    assert (outcome.verdict, outcome.refusal) == (Verdict.UNSUPPORTED, Refusal.SEED)


# Whole models are served with the inputs of the default seed alone.
OF_SEEDS = [m for m in MUTANTS if not m.killed_by[0].startswith("generate-")]


def of_goldens() -> list[Mutant]:
    """Whose named check returns facts."""
    named = {(case.id, name.removeprefix("test_")): case for _, name, case in CHECKS}
    return [
        m for m in MUTANTS if (case := named.get(m.killed_by)) and case.id in recorded(case.bug_class, m.killed_by[1])
    ]


@pytest.mark.parametrize(
    "mutant",
    [
        *of_goldens()[::4],
        *(pytest.param(m, marks=pytest.mark.nightly) for m in OF_SEEDS if m not in of_goldens()[::4]),
    ],
    ids=lambda mutant: mutant.engine.name,
)
def test_a_mutant_dies_without_a_golden(mutant: Mutant) -> None:
    """The oracle judges all that a golden says of hashed inputs: under another seed nothing passes unjudged."""
    judge = Judge(Target(mutant.engine.name, f"{mutant.engine.__module__}:{mutant.engine.__qualname__}"), seed=1)
    judge.adapters = judge.adapters[1:]
    module, name, case = next(row for row in CHECKS if (row[2].id, row[1].removeprefix("test_")) == mutant.killed_by)
    outcome = judge.run(module, name, case)
    is_golden = outcome.facts is None or matches(case.bug_class, mutant.killed_by[1], case.id, outcome.facts)
    assert at_level(outcome, case.level).verdict.badness or not is_golden


@pytest.mark.parametrize("asked", [*ASKED, "reference", "odd'quote.py:X"])
def test_a_rerun_line_is_for_a_shell_whatever_the_engine_was_asked_for_as(asked: str) -> None:
    case = catalogue()[CASE]
    line = rerun(asked, case, seed=7)
    assert shlex.split(line)[2:] == ["--engine", asked, "--case", CASE, "--seed", "7"]
    said = result(Verdict.FAIL, failure(asked, case, CHECK, "bad", seed=7))
    assert command(said) == (line if "'" not in asked else f"moe-conformance run --engine mine --case {CASE}")


def run(folder: Path, *arguments: str) -> list[dict[str, object]]:
    """The lines of the verdict stream of `moe-conformance run`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST") and name != "CI"}
    subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", *arguments, "--in-process", "--out", "out", "-k", CHECK],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(TESTS)},
        capture_output=True,
    )
    return [json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "asked",
    [pytest.param(ASKED[0], marks=pytest.mark.nightly), pytest.param(ASKED[1], marks=pytest.mark.nightly), ASKED[2]],
)
def test_the_rerun_line_leads_to_the_same_failure(asked: str, tmp_path: Path) -> None:
    (tmp_path / "my adapters").mkdir()
    (tmp_path / "my adapters" / "wrong.py").write_text(
        "import fake_engines\n\n\nclass Mine(fake_engines.AlwaysWrong):\n    name = 'mine'\n"
    )
    first = run(tmp_path, "--engine", asked, "--case", CASE, "--seed", "5")
    (failed,) = (line for line in first if line["kind"] == "result")
    again = shlex.split(str(failed["message"]).rpartition("rerun:")[2])
    assert again[:2] == ["moe-conformance", "run"]
    (second,) = (line for line in run(tmp_path, *again[2:]) if line["kind"] == "result")
    assert failed["verdict"] == "fail" and first[0]["selection"]["seed"] == 5  # type: ignore[index]
    assert {**second, "seconds": 0} == {**failed, "seconds": 0}


def test_a_file_whose_name_is_another_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("class Mine: ...\n")
    with pytest.raises(UsageError, match=r"json is the name of .*json.__init__\.py, too; rename the file"):
        resolve(f"{tmp_path}/json.py:Mine").load()
    with pytest.raises(UsageError, match="got no file"):
        resolve(f"{tmp_path}/absent.py:Mine").load()


def test_the_seed_reaches_a_check_through_the_judge() -> None:
    """What a wrong engine answers is wrong by other numbers."""
    judge = [Judge(Target("wrong", "fake_engines:AlwaysWrong"), seed) for seed in (0, 1)]
    row = next(row for row in CHECKS if (row[2].id, row[1]) == (CASE, f"test_{CHECK}"))
    assert judge[0].run(*row).message != judge[1].run(*row).message
