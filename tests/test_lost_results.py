"""Every selected result is in one cell, whatever other plug-ins, workers and adapters do; a run without its end is no
success."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

CASES = ("layer-tiny-padded-hidden", "layer-tiny-latent-padded-hidden", "layer-tiny-shared-padded-hidden")
OF_ONE = 'if item.nodeid.endswith("layer-tiny-latent-padded-hidden]"):'


class Run(NamedTuple):
    code: int
    verdicts: list[tuple[str, str]]
    text: str


def run(folder: Path, plugin: str, *arguments: str, engine: str = "reference") -> Run:
    """Judge an engine, the reference passes, on CASES by one check beside a plug-in of this source."""
    (folder / "other_plugin.py").write_text(f"import os, sys, pytest\n{plugin}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST") and name != "CI"}
    options = [item for case in CASES for item in ("--case", case)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moe_conformance.cli", "run", "--engine", engine, "-p", "other_plugin"),
            *(*options, "-k", "padding_never", "--out", str(folder / "out"), *arguments),
        ],
        cwd=folder,
        env={**clean, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent}"},
        text=True,
        capture_output=True,
    )
    stream = folder / "out" / "verdicts.jsonl"
    whole = stream.read_text().rpartition("\n")[0].splitlines() if stream.is_file() else []
    lines = [json.loads(line) for line in whole]
    verdicts = sorted((line["case"], line["verdict"]) for line in lines if line["kind"] == "result")
    return Run(done.returncode, verdicts, done.stdout + done.stderr)


def failed(done: Run) -> str:
    """Of the class of all CASES, as the table has it: failed of judged."""
    _, _, table = done.text.partition("\nMUST: failed of judged  reference\n")
    return table.partition("\n")[0].removeprefix("shape-mismatch").strip()


def with_error(case: str) -> list[tuple[str, str]]:
    return sorted((name, "error" if name == case else "pass") for name in CASES)


def test_what_another_plugin_skips_was_not_judged_and_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, f"def pytest_runtest_setup(item):\n    {OF_ONE} pytest.skip('flaky')", "--in-process")
    assert (done.code, done.verdicts) == (1, with_error("layer-tiny-latent-padded-hidden"))
    assert failed(done) == "1/3"


@pytest.mark.nightly
def test_what_a_worker_skips_is_an_error_of_a_run_by_the_packages_name(tmp_path: Path) -> None:
    """From another folder: the workers' node ids begin at the suites' folder, wherever pytest's root is."""
    (tmp_path / "other_plugin.py").write_text(
        f"import pytest\ndef pytest_runtest_setup(item):\n    {OF_ONE} pytest.skip('flaky')"
    )
    options = ["--moe-engine", "reference", *(f"--moe-case={case}" for case in CASES), "-k", "padding_never", "-n", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "moe_conformance.suites", "-p", "other_plugin", *options],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name[:6] != "PYTEST"} | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and re.search(r"shape-mismatch +1/3\n", done.stdout), done.stdout + done.stderr


@pytest.mark.nightly
def test_what_another_plugin_breaks_is_an_error_of_its_case(tmp_path: Path) -> None:
    done = run(tmp_path, f"def pytest_runtest_setup(item):\n    {OF_ONE} raise OSError('no disk')", "--in-process")
    assert (done.code, done.verdicts) == (1, with_error("layer-tiny-latent-padded-hidden"))


RERUN = """
from _pytest.runner import runtestprotocol
def pytest_runtest_protocol(item):
    for turn in range(2):
        for report in runtestprotocol(item, log=False):
            if turn == 0 and report.when == "call":
                report.outcome = "rerun"
            if turn == 1 or report.when == "call":
                item.ihook.pytest_runtest_logreport(report=report)
    return True
"""


def test_what_another_plugin_runs_again_counts_once(tmp_path: Path) -> None:
    done = run(tmp_path, RERUN, "--in-process")
    assert (done.code, done.verdicts) == (0, with_error("none"))


def test_what_another_plugin_runs_again_keeps_its_first_answer(tmp_path: Path) -> None:
    """tests/test_beside_plugins.py tries the real packages."""
    done = run(tmp_path, RERUN, "--in-process", engine="fake_engines:RightAtLast")
    assert done.code == 1
    assert Counter(verdict for _, verdict in done.verdicts) == {"fail": 1, "pass": 2}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "plugin",
    [
        "def pytest_configure(): sys.exit(0)",
        "def pytest_sessionfinish(session): session.config.pluginmanager.unregister(name='moe_conformance_accounts')",
        "@pytest.hookimpl(tryfirst=True)\ndef pytest_terminal_summary(): sys.exit(0)",
    ],
)
def test_a_run_that_ends_before_its_footer_is_no_success(tmp_path: Path, plugin: str) -> None:
    done = run(tmp_path, plugin, "--in-process")
    assert done.code == 1
    assert "the run ended before its footer" in done.text or "SystemExit" in done.text


@pytest.mark.nightly
def test_a_killed_worker_loses_its_case_which_is_said(tmp_path: Path) -> None:
    kill = f"""
def pytest_runtest_setup(item):
    {OF_ONE} os.kill(os.getpid(), 9)
"""
    done = run(tmp_path, kill, "-n", "2", "--case", "layer-tiny-plain")
    assert (done.code, done.verdicts) == (1, with_error("layer-tiny-latent-padded-hidden"))
    assert " 0 deselected" not in done.text  # by -k, of which the workers tell
    assert failed(done) == "1/3"


AT_ONE = f"def pytest_runtest_setup(item):\n    {OF_ONE} raise KeyboardInterrupt\n"
AT_ONCE, AT_THE_END = (
    f"def pytest_{hook}(): raise KeyboardInterrupt\n" for hook in ("keyboard_interrupt", "sessionfinish")
)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "again",
    [
        pytest.param("", id="once"),
        pytest.param(AT_ONCE, id="again-at-once"),
        pytest.param(AT_THE_END, id="again-at-the-end"),
        pytest.param(AT_ONCE + AT_THE_END, id="three-times"),
    ],
)
def test_what_a_ctrl_c_kept_from_running_is_no_error_of_its_case(tmp_path: Path, again: str) -> None:
    done = run(tmp_path, AT_ONE + again, "--in-process")
    (judged,) = done.verdicts
    assert (done.code, judged) == (130, ("layer-tiny-padded-hidden", "pass"))
    assert failed(done) == "0/1" and "Traceback" not in done.text
    assert done.text.count("interrupted: 2 of 3 selected items were not run") == 1


LITTLE_DISK = """
import resource
def pytest_runtest_setup(item):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""


def test_what_a_full_disk_and_a_ctrl_c_leave_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, f"{LITTLE_DISK}    {OF_ONE} raise KeyboardInterrupt\n{AT_ONCE}", "--in-process")
    assert (done.code, done.verdicts) == (130, [])
    assert failed(done) == "0/1" and "Traceback" not in done.text
    assert done.text.count("interrupted: 2 of 3 selected items were not run\n") == 1
    assert "out: [Errno 27] File too large; free space, or name another folder\n" in done.text
    assert "at the end of the run: [Errno 27] File too large; free space, and run again\n" in done.text


@pytest.mark.nightly
def test_a_full_disk_costs_files_and_no_verdict(tmp_path: Path) -> None:
    """The stream breaks off before its results, and neither the summary nor junit.xml can be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.md").symlink_to("/dev/full")
    done = run(tmp_path, LITTLE_DISK, "--in-process")
    assert done.code == 1 and len(done.verdicts) < 3
    assert failed(done) == "0/3" and "Traceback" not in done.text
    for trouble in ("[Errno 27] File too large", "[Errno 28] No space left on device"):
        assert f"out: {trouble}; free space, or name another folder\n" in done.text
    assert "at the end of the run: [Errno 27] File too large; free space, and run again" in done.text


@pytest.mark.nightly
def test_a_summary_that_cannot_be_written_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.md").symlink_to("/dev/full")
    done = run(tmp_path, "", "--in-process")
    assert (done.code, done.verdicts) == (1, with_error("none"))


def test_a_place_that_takes_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "verdicts.jsonl").symlink_to("/dev/full")
    done = run(tmp_path, "", "--in-process")
    assert done.code == 2 and "Traceback" not in done.text
    assert "ERROR: --out: cannot write to" in done.text and "No space left on device" in done.text


def test_a_missing_golden_is_an_error_and_not_the_engines_fail(tmp_path: Path) -> None:
    case, plugin = (
        "closure-gemma4-per-expert-scale-functional-call",
        f"""
from pathlib import Path
from moe_conformance.judging import goldens
goldens.FOLDER = Path({str(tmp_path)!r})
""",
    )
    done = run(tmp_path, plugin, "--in-process", "--case", case, "-k", "values_at_call_time")
    assert (done.code, done.verdicts) == (1, [(case, "error")])
    assert f"no golden of {case} for routing_uses_the_values_at_call_time" in done.text


def test_an_adapter_that_exits_when_imported_costs_its_own_cases(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import os; os._exit(0)")
    done = run(tmp_path, "", "--engine", "reference", "-n", "0", engine="exits:Mine")
    assert done.code == 1
    assert done.verdicts == sorted([(case, "crash") for case in CASES] + [(case, "pass") for case in CASES])
    assert "while its module exits was imported: exit code 0" in done.text


def test_a_stolen_name_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "thief.py").write_text('class Mine:\n    name = "reference"\n    layer = print\n')
    done = run(tmp_path, "", "-n", "0", engine="thief:Mine")
    assert (done.code, done.verdicts) == (2, [])
    assert "got name 'reference', which is that of moe_conformance.engines.reference:Reference" in done.text
