"""Progress of a run: one line that is overwritten if the output is a terminal, otherwise nothing.

Registered by `moe-conformance run` on the controller. It replaces pytest's dots. It also prints errors of collection,
which pytest hides together with the failures that the report tells.
"""

from __future__ import annotations

import json
import time

import pytest

from moe_conformance.catalogue.case import catalogue
from moe_conformance.judging.verdict import Verdict

# Seconds between two lines: nobody reads faster.
SECONDS = 0.2
# Results before the first estimate of the time left.
ENOUGH = 20


class Progress:
    def __init__(self) -> None:
        self.started = self.said = 0.0
        self.total = self.done = self.failed = 0
        # Node ids that are running, in the order of their start.
        self.running: dict[str, None] = {}
        self.collection: list[str] = []

    @pytest.hookimpl(trylast=True)  # after the terminal reporter
    def pytest_configure(self, config: pytest.Config) -> None:
        self.terminal: pytest.TerminalReporter | None = config.pluginmanager.get_plugin("terminalreporter")
        self.session = config.pluginmanager.get_plugin("moe_conformance_session")
        option = config.option
        # With -v pytest's own output is wanted; with -s and --pdb other output comes between two lines.
        self.is_quiet = option.verbose < 0
        shown = self.terminal is not None and self.terminal.isatty and self.is_quiet
        self.is_shown = shown and option.capture != "no" and not option.usepdb

    def pytest_collection(self) -> None:
        self._say("collecting")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = len(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection.append(f"{report.nodeid}\n{report.longrepr}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        now = time.monotonic()
        self.started = self.started or now
        self.running[nodeid] = None
        if now - self.said > SECONDS:
            self._say(self.line(now))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Already imported by now. Importing it earlier would come before pytest's assertion rewriting of plug-ins.
        from moe_conformance.running.session import PROPERTY

        if self.is_shown and report.when == "call":
            self.failed += sum(_is_bad(str(told)) for name, told in report.user_properties if name == PROPERTY)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said > SECONDS or self.done == 1:
            self._say(self.line(now))
        self.running.pop(nodeid, None)

    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter in place of pytest's; -v keeps its words."""
        when = getattr(report, "when", "collect")
        if not self.is_quiet or when == "collect" or (when != "call" and not report.skipped):
            return None
        outcome = str(report.outcome)
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        return outcome, "", ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if self.is_shown and self.terminal is not None:
            self.terminal.rewrite("", erase=True)
            self.terminal.rewrite("")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if terminalreporter.config.option.tbstyle == "no":
            for said in self.collection:
                terminalreporter.write_line(f"not collected: {said}", red=True)

    def line(self, now: float) -> str:
        """For instance " 412/1893  21%  reference: layer  3 failed  1:20 left"."""
        share = self.done / self.total if self.total else 0.0
        parts = [f"{self.done}/{self.total} {share:4.0%}", ", ".join(self._places())]
        parts += [f"{self.failed} failed"] * bool(self.failed)
        if self.done >= ENOUGH and self.total > self.done:
            left = round((now - self.started) / self.done * (self.total - self.done))
            parts.append(f"{left // 60}:{left % 60:02} left")
        return "  ".join(filter(None, parts))

    def _places(self) -> list[str]:
        """Engine and stage of what is running, one for each worker."""
        assert self.session is not None
        engines = sorted((target.name for target in self.session.targets), key=len, reverse=True)
        found: dict[str, None] = {}
        for nodeid in self.running:
            inside = nodeid.partition("[")[2].removesuffix("]")
            engine = next((name for name in engines if inside.startswith(f"{name}-")), "")
            case = catalogue().get(inside.removeprefix(f"{engine}-"))
            if engine:
                found[f"{engine}: {case.stage}" if case else engine] = None
        return list(found)

    def _say(self, line: str) -> None:
        if self.is_shown and self.terminal is not None:
            self.said = time.monotonic()
            self.terminal.rewrite(line[: self.terminal._tw.fullwidth - 1], erase=True)


def _is_bad(told: str) -> bool:
    return Verdict(json.loads(told)[0]["verdict"]).is_bad
