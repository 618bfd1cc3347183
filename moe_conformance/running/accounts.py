"""The outcome of a run, on the controller: every selected result in one cell, and whether the run is good."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result
from moe_conformance.reporting.report import Report
from moe_conformance.running.session import PROPERTY, SUITES, Session, engine_of


class Accounts:
    """Registered beside the session, on the controller only."""

    def __init__(self, config: pytest.Config, session: Session) -> None:
        self.config = config
        self.session = session
        try:
            about = {
                "selection": session.selection,
                "shard": asdict(session.shard) if session.shard else None,
                "chosen": session.is_chosen,
                "away": session.away,
            }
            self.report = Report(config, session.targets, session.away, len(session.cases), about)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        # What makes the run bad although no result is bad, a line each.
        self.complaints: list[str] = []
        self.was_interrupted = False
        # Node ids of the suites' items: those collected, and those that reported something.
        self.collected: set[str] = set()
        self.heard: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = {item.nodeid for item in session.items if engine_of(item)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collected = {nodeid for nodeid in ids if "[" in nodeid and _in_suites(nodeid, self.config)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """What a worker found after its last item, and what it deselected, which is the same on every worker."""
        lines, deselected = getattr(node, "workeroutput", {}).get(PROPERTY, ((), 0))
        self.session.deselected = max(self.session.deselected, deselected)
        for line in lines:
            self.report.add(Result.from_line(line), {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # If a plug-in runs an item again, each attempt reports the same: see session.py.
        if report.outcome == "rerun" or report.nodeid in self.heard:  # type: ignore[comparison-overlap]
            return
        found = [json.loads(str(told)) for name, told in report.user_properties if name == PROPERTY]
        if report.when == "call" and found:
            self.heard.add(report.nodeid)
            for line, facts in found:
                self.report.add(Result.from_line(line), facts)
        elif report.failed and not found and "[" in report.nodeid and _in_suites(report.nodeid, self.config):
            self.heard.add(report.nodeid)
            self.report.lost(report.nodeid, str(report.longrepr))

    @pytest.hookimpl(wrapper=True, trylast=True)  # before the terminal reporter, which prints the table after it
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, object, object]:
        self.pytest_session = session
        try:
            self._close(exitstatus)
            yielded = yield
            # Behind the yield, because syrupy sets the status to what it was before.
            if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.session.shard is not None:
                session.exitstatus = pytest.ExitCode.OK
            return yielded
        except KeyboardInterrupt:  # a second time, and still with a table
            self._interrupt()
        except OSError as error:  # of pytest's own files, as junit.xml is
            self.complaints.append(f"at the end of the run: {error}; free space, and run again")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """A second Ctrl-C may come before pytest knows of the first."""
        self.was_interrupted = True

    def _interrupt(self) -> None:
        self.was_interrupted = True
        self.pytest_session.exitstatus = pytest.ExitCode.INTERRUPTED
        left = len(self.collected - self.heard)
        if left and not any("were not run" in line for line in self.complaints):
            self.complaints.append(f"interrupted: {left} of {len(self.collected)} selected items were not run")

    def _close(self, exitstatus: int) -> None:
        """Judge the run as a whole."""
        if self.was_interrupted or exitstatus == pytest.ExitCode.INTERRUPTED:
            self._interrupt()
            return
        option = self.config.option
        if (later := self.session.look_back()) is not None:
            self.report.add(later, {})
        ran_through = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not option.maxfail
        if ran_through and not option.collectonly:
            for nodeid in sorted(self.collected - self.heard):
                self.report.lost(nodeid, "it was selected, and no result came of it")
            # A shard may contain nothing that its engine offers; `merge` checks the whole.
            if self.session.shard is None:
                self.complaints += unjudged(self.report.results, self.session.is_chosen)
        if ran_through and not self.session.deselected:
            self.complaints += [
                stray for entry in self.session.known.values() for stray in entry.strays(self.report.results)
            ]
        # A bad verdict makes a bad run, whatever pytest says of the items.
        worst = 1 if self.session.strict else 2
        is_bad = bool(self.complaints) or any(result.verdict.badness >= worst for result in self.report.results)
        if is_bad and exitstatus == pytest.ExitCode.OK:
            self.pytest_session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        exitstatus = self.pytest_session.exitstatus  # the status as it is now; the reporter has an older one
        self.report.finish(terminalreporter, exitstatus, self.session.deselected)
        if self.report.troubles:
            self.pytest_session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED
        for complaint in [*self.complaints, *self.report.troubles]:
            terminalreporter.write_line(complaint, red=True)


def unjudged(results: Iterable[Result], is_chosen: bool) -> list[str]:
    """Engines asked for by name of which nothing was judged; if none was named, whether nothing was judged at all."""
    by_engine: dict[str, list[Result]] = {}
    for result in results:
        by_engine.setdefault(result.engine, []).append(result)
    found = {name: theirs for name, theirs in by_engine.items() if not any(r.verdict.was_judged for r in theirs)}
    if not is_chosen and len(found) < len(by_engine):
        return []
    return [f"{name}: nothing was judged: {_most(theirs)}" for name, theirs in found.items()]


def _in_suites(nodeid: str, config: pytest.Config) -> bool:
    """Whether a node id is of our suites.

    With --pyargs it is relative to the suites' folder, not to pytest's root; a remote worker's is relative to its own
    root.
    """
    path = Path(nodeid.partition("::")[0])
    return SUITES in (config.rootpath / path).resolve().parents or SUITES.joinpath(*path.parts[-2:]).is_file()


def _most(results: list[Result]) -> str:
    """For instance "40 unsupported, of which 31: stage layer is not offered"."""
    counts = Counter((result.verdict, _reason(result)) for result in results)
    (verdict, reason), most = counts.most_common(1)[0]
    same = sum(count for (other, _), count in counts.items() if other is verdict)
    return f"{same} {verdict}, of which {most}: {reason}"


def _reason(result: Result) -> str:
    """The first line of the message behind the check, with which that of a bad verdict begins."""
    return result.message.removeprefix(f"{result.check.replace('_', ' ')}\n").partition("\n")[0]
