"""Kernels against the reference functions that they are twins of: interpreted without a GPU, compiled with one.

Triton decides which when it is imported. Where this process has no GPU and was not started with TRITON_INTERPRET=1, the
tests of a module run in a process that was, and their reports are given here as if they had run in this one:

    pytest tests/kernel_twins                       # compiled where there is a GPU, otherwise interpreted
    TRITON_INTERPRET=1 pytest tests/kernel_twins    # interpreted, in pytest's own process (--pdb, coverage, profilers)

Interpreted, programs of a grid run last to first, and an access outside the tensors of its launch raises.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_conformance.running.devices import gpu_count

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Where the process that another one started for these tests writes its reports, pickled one behind the other.
REPORTS = "MOE_CONFORMANCE_TWIN_REPORTS"
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TRITON_DEFAULT_FP_FUSION": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
elsewhere = not INTERPRETED and not gpu_count()
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def twin() -> Iterator[None]:
    """No gradients; interpreted, every address, order of programs and integer is checked."""
    import torch

    with torch.no_grad():
        if not INTERPRETED:
            yield
            return
        from kernel_twins.bounds import checked

        from moe_conformance.kernels.interpreter import make_light

        make_light(check_overflow=True)
        with checked(backwards=True):
            yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Give the reports of a process that interprets, started with the first test of each module."""
    if not elsewhere or not item.path.is_relative_to(HERE):
        return None
    kept: dict[Path, dict[str, list[Any]]] = item.session.stash.setdefault(_KEPT, {})
    if item.path not in kept:
        kept[item.path] = reports_of([other for other in item.session.items if other.path == item.path])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in kept[item.path].get(item.nodeid, ()):
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


_KEPT = pytest.StashKey[dict[Path, dict[str, list[Any]]]]()


def reports_of(items: list[pytest.Item]) -> dict[str, list[Any]]:
    """Serialised reports by test; of a test that was not run to its end, one that says how the process ended."""
    config = items[0].config
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        reports.touch()
        command = [sys.executable, "-P", "-W", "ignore", "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
        command += [item.nodeid for item in items]
        environment = os.environ | ENVIRONMENT | {REPORTS: str(reports)}
        ran = subprocess.run(command, env=environment, cwd=config.rootpath, capture_output=True, text=True)
        found: dict[str, list[Any]] = {item.nodeid: [] for item in items}
        with reports.open("rb") as file:
            while file.peek():
                data = pickle.load(file)
                found[data["nodeid"]].append(data)
    for item in items:
        if not any(data["when"] == "teardown" for data in found[item.nodeid]):
            text = f"no report of this test; its process ended with {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
            lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
            found[item.nodeid].append(config.hook.pytest_report_to_serializable(config=config, report=lost))
    return found


def pytest_configure(config: pytest.Config) -> None:
    """In a process that another one started: hand every report over."""
    if REPORTS in os.environ:
        config.pluginmanager.register(Reporter(config, Path(os.environ[REPORTS])))


class Reporter:
    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.path.open("ab") as file:
            pickle.dump(data, file)  # tuples stay tuples
