"""Beside pytest's best known plug-ins, by their real packages: the same verdicts, each counted once, and the footer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

# They are in no extra: two of them act in every run of an environment that has them.
PACKAGES = {
    "pytest-rerunfailures": ("pytest-rerunfailures==16.7",),
    "pytest-timeout": ("pytest-timeout==2.4.0",),
    "pytest-randomly": ("pytest-randomly==5.1.0",),
    "pytest-cov": ("pytest-cov==7.1.0", "coverage==7.17.5"),
}
CASES = ("layer-tiny-padded-hidden", "layer-tiny-latent-padded-hidden", "layer-tiny-shared-padded-hidden")
ENGINES = ("reference", "fake_engines:AlwaysWrong", "fake_engines:NotInstalled", "fake_engines:RightAtLast")
# Prints which distributions' plug-ins were active, so that none is tried by not being there.
WITNESS = """
def pytest_unconfigure(config):
    print("PLUGINS", sorted({d.project_name for _, d in config.pluginmanager.list_plugin_distinfo()}))
"""


class Run(NamedTuple):
    """table: from its head to what was not judged. verdicts: (engine, case, verdict), with how often each was said."""

    code: int
    table: str
    verdicts: Counter[tuple[str, str, str]]
    text: str


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each plug-in alone: on PYTHONPATH it is installed."""
    found = {}
    for name, packages in PACKAGES.items():
        found[name] = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(found[name])]
        subprocess.run([*command, *packages], check=True)
    return found


def run(folder: Path, site: Path | None, *arguments: str, engines: tuple[str, ...] = ENGINES, hooks: str = "") -> Run:
    """hooks: source of further ones."""
    folder.mkdir()
    (folder / "witness.py").write_text(WITNESS + hooks)
    path = os.pathsep.join(str(part) for part in (site, folder, Path(__file__).parent) if part)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    chosen = [item for case in CASES for item in ("--case", case)]
    chosen += [item for engine in engines for item in ("--engine", engine)]
    command = [sys.executable, "-m", "moe_conformance.cli", "run", *chosen, "-k", "padding_never", "-p", "witness"]
    done = subprocess.run(
        [*command, "--out", "out", *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    lines = [json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()]
    said = Counter((line["engine"], line["case"], line["verdict"]) for line in lines if line["kind"] == "result")
    assert lines[-1]["kind"] == "footer"
    _, head, rest = done.stdout.partition("= conformance =")
    return Run(done.returncode, head + rest.partition(" deselected.")[0], said, done.stdout + done.stderr)


@pytest.fixture(scope="module", params=["0", "2"], ids=["alone", "two-workers"])
def workers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(workers: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without any of them."""
    return run(tmp_path_factory.mktemp("plain") / "run", None, "-n", workers)


@pytest.mark.nightly
def test_the_run_to_compare_with_has_one_result_a_case(plain: Run) -> None:
    assert plain.code == 1
    assert set(plain.verdicts.values()) == {1} and len(plain.verdicts) == len(CASES) * len(ENGINES)
    assert Counter(engine for engine, _, verdict in plain.verdicts if verdict == "pass") == {
        "reference": 3,
        "right-at-last": 2,
    }
    assert not any(f"'{name}'" in plain.text.partition("PLUGINS")[2] for name in PACKAGES)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pytest-rerunfailures", ("--reruns", "2")),
        # Not --timeout, which is this suite's own.
        ("pytest-timeout", ("-o", "timeout=300")),
        ("pytest-randomly", ()),
        ("pytest-cov", ("--cov=moe_conformance", "--cov-report=term")),
    ],
)
def test_the_verdicts_are_those_without_it(
    name: str, options: tuple[str, ...], sites: dict[str, Path], plain: Run, workers: str, tmp_path: Path
) -> None:
    """Where randomly changes the order, another case may be the first, which right-at-last fails."""
    options = (*options, "-p", "no:randomly") if name != "pytest-randomly" else (*options, "-p", "randomly")
    done = run(tmp_path / "run", sites[name], "-n", workers, *options)
    assert f"'{name}'" in done.text.partition("PLUGINS")[2]
    assert (done.code, done.table) == (plain.code, plain.table)
    assert sorted(done.verdicts.values()) == sorted(plain.verdicts.values())
    if name != "pytest-randomly":
        assert done.verdicts == plain.verdicts


@pytest.mark.nightly
@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_of_passes_stays_one(name: str, sites: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path / "run", sites[name], "-n", "2", engines=("reference",))
    assert done.code == 0
    assert done.verdicts == {("reference", case, "pass"): 1 for case in CASES}


@pytest.mark.nightly
def test_what_is_run_again_says_why_it_failed(sites: dict[str, Path], tmp_path: Path) -> None:
    """What is wrong with a whole engine is told by the first of its items, every time that this one is run."""
    engines = ("fake_engines:NotInstalled",)
    done = run(tmp_path / "run", sites["pytest-rerunfailures"], "-n", "0", "--reruns", "2", engines=engines)
    assert done.code == 1
    assert "2 rerun" in done.text and "1 failed" in done.text
    assert "no package fake-engine; pip install fake-engine" in done.text.partition("1 distinct fault =")[2]


@pytest.mark.nightly
def test_a_process_that_dies_after_its_answer_is_a_result_of_its_own(sites: dict[str, Path], tmp_path: Path) -> None:
    """Which the next item finds: that one is run again, too, and must not lose it."""
    wait = "import time\ndef pytest_runtest_logfinish(): time.sleep(1)\n"  # between one item and the next
    engines = ("fake_engines:DiesLater",)
    done = run(tmp_path / "plain", None, "-n", "0", engines=engines, hooks=wait)
    again = run(
        tmp_path / "again", sites["pytest-rerunfailures"], "-n", "0", "--reruns", "1", engines=engines, hooks=wait
    )
    assert again.verdicts == done.verdicts
    assert again.verdicts == {("dies-later", case, verdict): 1 for case in CASES for verdict in ("fail", "crash")}


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["signal", "thread"])
def test_a_timeout_before_ours_is_no_success(method: str, sites: dict[str, Path], tmp_path: Path) -> None:
    """By a signal it costs the case. By a thread it ends the worker, whose case is lost; the others are judged."""
    options = ("-o", "timeout=15", "-o", f"timeout_method={method}")
    done = run(tmp_path / "run", sites["pytest-timeout"], "-n", "2", *options, engines=("fake_engines:Hangs",))
    assert done.code == 1
    assert done.verdicts == {
        ("hangs", "layer-tiny-padded-hidden", "fail"): 1,
        ("hangs", "layer-tiny-latent-padded-hidden", "error"): 1,
        ("hangs", "layer-tiny-shared-padded-hidden", "fail"): 1,
    }
