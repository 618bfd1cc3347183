"""Kernels against the reference functions that they are twins of: interpreted without a GPU, compiled with one.

Triton decides which when it is imported. Where this process has no GPU and was not started with TRITON_INTERPRET=1, the
tests run in a process that was, and their reports are given here as if they had run in this one:

    pytest tests/kernel_twins                       # compiled where there is a GPU, otherwise interpreted
    TRITON_INTERPRET=1 pytest tests/kernel_twins    # interpreted, in pytest's own process (--pdb, coverage, profilers)

Interpreted, programs of a grid run last to first, and an access outside the tensors of its launch raises.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

from moe_conformance.running.devices import gpu_count

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The file descriptor through which a process that interprets is told what to run.
CONNECTION = "MOE_CONFORMANCE_TWINS"
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
    """Give the reports of a process that interprets, started with the first test that needs one."""
    if not elsewhere or not item.path.is_relative_to(HERE):
        return None
    stash = item.session.stash
    if not stash.get(_INTERPRETING, None):
        stash[_INTERPRETING] = Interpreting(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = stash[_INTERPRETING].reports(item)
    if reports is None:
        text = f"no report of this test; its process ended with {stash[_INTERPRETING].end()}"
        reports = [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
        stash[_INTERPRETING] = None  # the next test gets another process
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class Interpreting:
    """A pytest that interprets, and runs the tests that it is told."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.connection, theirs = Pipe()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        options = ["-n", "0", "-p", "no:cacheprovider", "-q", str(HERE)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "pytest", *options],
            env=os.environ | ENVIRONMENT | {CONNECTION: str(theirs.fileno())},
            cwd=config.rootpath,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        config.add_cleanup(self.end)

    def reports(self, item: pytest.Item) -> list[pytest.TestReport] | None:
        """Of setup, call and teardown; None where the process is no more."""
        try:
            self.connection.send(item.nodeid)
            found = self.connection.recv()
        except (EOFError, OSError):
            return None
        restore = self.config.hook.pytest_report_from_serializable
        return [restore(config=self.config, data=data) for data in found]

    def end(self) -> str:
        """Its exit status and what it wrote."""
        self.connection.close()
        status = self.process.wait()
        if self.output.closed:
            return str(status)
        self.output.seek(0)
        with self.output:
            return f"{status}\n{self.output.read()}"


_INTERPRETING = pytest.StashKey[Interpreting | None]()


def pytest_configure(config: pytest.Config) -> None:
    if CONNECTION in os.environ:
        config.pluginmanager.register(Told(config, Connection(int(os.environ[CONNECTION]))))


class Told:
    """In the process that interprets: run what comes through the connection, and hand the reports over."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self.config, self.connection = config, connection
        self.reports: list[Any] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with contextlib.suppress(EOFError):
            while True:
                self.reports = []
                item = items[self.connection.recv()]
                self.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                self.connection.send(self.reports)
        return True
