"""The command line around `run`: usage errors, lists, explanations, comparison of runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe_conformance.cli import main

FOOTER = {"kind": "footer", "exit": 0, "results": 1, "counts": {}}


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "refrence"], "did you mean 'reference'?"),
        (["--engine", "no.such.module:Engine"], "No module named 'no'"),
        (["--engine", "moe_conformance.engines.reference:Engin"], "has no attribute 'Engin'"),
        (["--class", "shape-missmatch"], "shape-mismatch"),
        (["--case", "layer-tiny-plane"], "layer-tiny-plain"),
        (["--tier", "huge"], "'smoke', 'core', 'full', 'gpu'"),
    ],
)
def test_a_misspelt_name_is_a_usage_error_that_lists_what_there_is(arguments: list[str], words: str) -> None:
    code, output = invoke("run", *arguments)
    assert code == 2
    assert words in " ".join(output.split())


def test_an_unknown_pytest_option_is_a_usage_error() -> None:
    assert invoke("run", "--engine", "reference", "--no-such-option")[0] == 2


def test_goldens_are_written_by_nobody_but_the_reference(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", "--engine", "triton", "-n", "0", "--snapshot-update"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    assert "goldens are written from the reference engine" in done.stderr


def test_explain_says_what_and_why_without_running() -> None:
    code, output = invoke("explain", "layer-tiny-shared-padded-hidden")
    assert code == 0
    for part in ("shape-mismatch", "must be cut before", "vllm#40794", "H = 20", "Hp = 24", "--case layer-tiny"):
        assert part in output


def test_lists_name_every_engine_and_the_cases_of_a_class() -> None:
    engines = invoke("engines")[1]
    assert all(name in engines for name in ("reference", "transformers", "triton", "vllm"))
    cases = invoke("cases", "--class", "closure-capture")[1].splitlines()
    assert len(cases) > 30
    assert all(line.endswith("closure-capture") for line in cases)


def test_help_starts_fast() -> None:
    """Under 0.3 s, and without torch or pytest; the quickest of three, as machines are noisy."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moe_conformance.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3
    code = "import sys, moe_conformance.cli; sys.exit(bool({'torch', 'pytest', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def stream(folder: Path, *verdicts: str, footer: bool = True) -> str:
    """A finished run of cases c0, c1, ... with these verdicts."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"kind": "header"}]
    for number, verdict in enumerate(verdicts):
        fixed = {"engine": "e", "check": "k", "stage": "layer", "class": "x", "message": "", "seconds": 0}
        lines.append({"kind": "result", "case": f"c{number}", "verdict": verdict, **fixed})
    lines += [FOOTER] if footer else []
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_diff_tells_worse_from_better(tmp_path: Path) -> None:
    before = stream(tmp_path / "a", "pass", "fail", "pass", "unsupported")
    after = stream(tmp_path / "b", "fail", "pass", "unsupported", "pass")
    code, output = invoke("diff", before, after)
    assert code == 1
    assert "4 changed, 2 worse" in output
    assert "worse  e c0 k: pass -> fail" in output
    assert "worse  e c2 k: pass -> unsupported" in output
    assert invoke("diff", before, before) == (0, "0 changed, 0 worse\n")


def test_diff_refuses_a_run_that_died(tmp_path: Path) -> None:
    whole, dead = stream(tmp_path / "a", "pass"), stream(tmp_path / "b", "pass", footer=False)
    code, output = invoke("diff", whole, dead)
    assert code == 2
    assert "the run died before its end" in output
