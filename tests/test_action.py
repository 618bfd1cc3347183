"""The composite action: its steps are run here as a runner does, with the inputs in the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_conformance
from moe_conformance.starter.new_engine import new_engine

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
FAKES = {
    "ENGINE": "fake_engines:AlwaysWrong",
    "ARGUMENTS": "-n 0 --case layer-tiny-padded-hidden --case layer-tiny-latent-padded-hidden",
}
KNOWN = """
[[known]]
case = "{}"
check = "padding_never_reaches_the_output"
kind = "broken"
issue = "https://example.org/1"
"""


def judge(folder: Path, **inputs: str) -> tuple[int, str, str]:
    """Exit code, output and summary of the step that judges."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step.get("id") == "judge")
    names = {name: re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", value) for name, value in step["env"].items()}
    defaults = {name: str(ACTION["inputs"][found[1]].get("default", "")) for name, found in names.items() if found}
    assert len(defaults) == len(names)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GITHUB"))}
    # The interpreter of the tests, as setup-python puts its own in front.
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    runner = {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary"), "PATH": path}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=ROOT / "tests",
        env={**clean, **runner, "RUNNER_TEMP": str(folder), **defaults, **inputs},
        text=True,
        capture_output=True,
    )
    summary = folder / "summary"
    return done.returncode, done.stdout, summary.read_text(encoding="utf-8") if summary.exists() else ""


def test_a_new_failure_fails_the_job_and_is_annotated_once(tmp_path: Path) -> None:
    code, said, summary = judge(tmp_path, **FAKES)
    assert code == 1
    (line,) = (line for line in said.splitlines() if line.startswith("::error"))
    assert line.startswith("::error title=fail%3A always-wrong%3A padding never reaches the output::layer-tiny-")
    assert " and 1 more results%0Apadding never reaches the output%0A" in line
    assert summary.startswith("# MoE conformance") and "layer-tiny-padded-hidden" in summary
    assert (tmp_path / "output").read_text() == f"results={tmp_path}/conformance\n"
    stopped = re.search(r"::stop-commands::(\w+)\n", said)
    assert stopped and said.index(f"::{stopped[1]}::") < said.index("::error")


@pytest.mark.nightly
def test_failures_that_are_known_fail_no_job(tmp_path: Path) -> None:
    files = []
    for case in ("layer-tiny-padded-hidden", "layer-tiny-latent-padded-hidden"):
        files.append(tmp_path / f"{case}.toml")
        files[-1].write_text('engine = "always-wrong"\n' + KNOWN.format(case))
    code, said, _ = judge(tmp_path, **FAKES, KNOWN="\n".join(map(str, files)) + "\n")
    assert code == 0 and "::error" not in said, said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENGINE", "$(touch injected)"),
        pytest.param("ARGUMENTS", "-k `touch injected`", marks=pytest.mark.nightly),
    ],
)
def test_an_input_is_no_part_of_the_script(name: str, value: str, tmp_path: Path) -> None:
    code, said, _ = judge(tmp_path, **FAKES | {name: value}, TIER="smoke")
    assert code == 2 and not (ROOT / "tests" / "injected").exists(), said


def test_the_action_pins_the_suite_of_its_own_tag() -> None:
    assert ACTION["inputs"]["version"]["default"] == moe_conformance.__version__


def test_the_job_that_new_engine_writes_gives_the_action_what_it_takes(tmp_path: Path) -> None:
    folder = new_engine("brand-new", ["align"], tmp_path)
    job = yaml.safe_load((folder / ".github" / "workflows" / "conformance.yml").read_text(encoding="utf-8"))
    *_, step = job["jobs"]["conformance"]["steps"]
    assert step["uses"].endswith(f"@v{moe_conformance.__version__}")
    assert step["with"].keys() <= ACTION["inputs"].keys() and step["with"]["engine"] == "brand-new"
    assert (folder / step["with"]["known"]).is_file()


def test_every_workflow_is_read_by_a_yaml_parser() -> None:
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"], file
