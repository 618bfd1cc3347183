"""--in-process: checks run in pytest's own process, where a debugger stops inside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASE, CHECK = "layer-tiny-padded-hidden", "padding_never_reaches_the_output"


def run(folder: Path, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The fake engine that is always wrong, unless other engines are named, in one process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST") and name != "CI"}
    engines = () if "--engine" in arguments else ("--engine", "fake_engines:AlwaysWrong")
    return subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", "--in-process", "--case", CASE, *engines, *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(TESTS), **environment},
        text=True,
        capture_output=True,
        input=stdin,
    )


def test_a_debugger_stops_inside_the_check(tmp_path: Path) -> None:
    """Not in the comparison that raised: a check's own variables are at hand, and above it the engine's answer."""
    done = run(tmp_path, "--pdb", "-k", CHECK, stdin="p 'stopped in', case.id, got.shape, inputs.padded_hidden\nq\n")
    assert f"('stopped in', '{CASE}', torch.Size([7, 20]), 24)" in done.stdout, done.stdout
    assert "-> compare.close(" in done.stdout


@pytest.mark.nightly
def test_a_debugger_stops_in_an_adapter_that_raises(tmp_path: Path) -> None:
    engine = ("--engine", "fake_engines:AdapterBroken")
    done = run(tmp_path, "--pdb", "-k", CHECK, *engine, stdin="p 'width', inputs.x.shape[-1]\nq\n")
    assert "('width', 20)" in done.stdout, done.stdout


def test_the_verdict_is_that_of_a_process_and_the_run_is_marked(tmp_path: Path) -> None:
    done = run(tmp_path, "-k", CHECK, "--out", "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    (result,) = (line for line in lines if line["kind"] == "result")
    assert (done.returncode, result["verdict"], lines[0]["in_process"]) == (1, "fail", True)
    assert "rerun:    moe-conformance run --engine fake_engines:AlwaysWrong" in result["message"]
    for text in (done.stdout, (tmp_path / "out" / "summary.md").read_text()):
        assert "in process: checks ran in pytest's own process" in text
    assert f"in test_{CHECK}" in done.stdout or f"def test_{CHECK}" in done.stdout


@pytest.mark.nightly
def test_the_engine_is_in_pytests_process(tmp_path: Path) -> None:
    (tmp_path / "tells_its_process.py").write_text(
        "import os\n"
        "from fake_engines import AlwaysWrong\n"
        "class TellsItsProcess(AlwaysWrong):\n"
        "    name = 'tells-its-process'\n"
        "    @classmethod\n"
        "    def environment(cls):\n"
        "        return {'OF_THE_ENGINE': 'here'}\n"
        "    def layer(self, inputs):\n"
        "        print('process', os.getpid(), os.environ['OF_THE_ENGINE'])\n"
        "        return inputs.x\n"
    )
    (tmp_path / "tells_pytests.py").write_text("import os\nprint('process', os.getpid(), 'here')\n")
    done = run(tmp_path, "-s", "-p", "tells_pytests", "--engine", "tells_its_process:TellsItsProcess")
    said = {line for line in done.stdout.splitlines() if "process " in line and line.endswith(" here")}
    assert len({line[line.index("process ") :] for line in said}) == 1, done.stdout
    assert done.stdout.count(" here\n") > 2


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((), {"CI": "true"}, "--in-process: got CI='true' in the environment"),
        (("-n", "2"), {}, "--in-process: got -n 2, want -n 0"),
        (("--engine", "reference", "--engine", "fake_engines:Hangs"), {}, "got the engines reference, hangs, want one"),
    ],
)
def test_it_is_refused_where_one_process_cannot_stand_for_the_run(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    done = run(tmp_path, *arguments, **environment)
    assert (done.returncode, words in done.stderr) == (2, True), done.stdout + done.stderr
