"""What a run leaves behind: the verdict stream, the Markdown summary, and the table at the end."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import pytest

from moe_conformance import __version__
from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.judging.plain import fence, plain
from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.model.families.installed import installed
from moe_conformance.protocol.stages import PROTOCOL_VERSION
from moe_conformance.reporting.facts import run_facts
from moe_conformance.reporting.faults import Fault, faults, told
from moe_conformance.reporting.refusals import listed
from moe_conformance.reporting.tables import Columns, as_markdown, as_text
from moe_conformance.running.discovery import Target

IN_PROCESS = "in process: checks ran in pytest's own process, where a crash or a hang is no verdict"
# How many reasons of refusals the terminal shows for an engine and kind; summary.md has all.
REASONS_SHOWN = 8
# How many cases summary.md names for one fault.
CASES_LISTED = 20


class Report:
    """Gathers results on the controller and writes them as they come."""

    def __init__(
        self,
        config: pytest.Config,
        targets: Sequence[Target],
        away: Mapping[str, str],
        cases: int,
        about: Mapping[str, Any],
    ) -> None:
        """about: keys to add to the header, or to replace there."""
        self.targets = [target.name for target in targets]
        self.away = away
        self.cases = cases
        self.in_process = bool(config.getoption("--moe-in-process"))
        self.strict = bool(config.getoption("--moe-strict"))
        self.seed = int(about.get("selection", {}).get("seed", 0))
        self.has_junit = bool(config.getoption("--junitxml", None))  # joined shards have none
        self.results: list[Result] = []
        self.is_finished = False
        # What could not be written, a line each.
        self.troubles: list[str] = []
        self.engines: dict[str, Mapping[str, str]] = {}
        self.folder = Path(config.getoption("--moe-out")) if config.getoption("--moe-out") else None
        self._stream: TextIO | None = None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stream = (self.folder / "verdicts.jsonl").open("w", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--out: cannot write to {self.folder}: {error}") from error
        header = {
            "kind": "header",
            "suite": __version__,
            "protocol": PROTOCOL_VERSION,
            "engines": self.targets,
            "cases": cases,
            "in_process": self.in_process,
            "strict": self.strict,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **run_facts(),
        }
        self._write(**{**header, **about})
        if self.troubles:
            raise UsageError(self.troubles[0])

    def _write(self, **line: Any) -> None:
        """After a failed write nothing more is written, so that the stream has no footer and is not whole."""
        if self._stream is not None:
            with self._told():
                self._stream.write(json.dumps(line) + "\n")
                self._stream.flush()
            if self.troubles:
                self._stream = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk costs files, but no verdict."""
        try:
            yield
        except OSError as error:
            self.troubles.append(f"--out: cannot write to {self.folder}: {error}; free space, or name another folder")

    def add(self, result: Result, facts: Mapping[str, str]) -> None:
        if facts and result.engine not in self.engines:
            self.engines[result.engine] = facts
            self._write(kind="engine", engine=result.engine, **facts)
        self.results.append(result)
        self._write(**result.as_line())

    def lost(self, nodeid: str, message: str) -> None:
        """Count a result as lost: a pytest worker died, a test broke before it could judge, or never reported."""
        check, _, rest = nodeid.rpartition("::")[2].removeprefix("test_").partition("[")
        engine = max((name for name in self.targets if rest.startswith(f"{name}-")), key=len, default="?")
        case = catalogue().get(name := rest.removeprefix(f"{engine}-").removesuffix("]"))
        bug_class, stage = (case.bug_class, case.stage) if case else ("?", "?")
        self.add(Result(engine, name, check, bug_class, stage, Verdict.ERROR, plain(message)), {})

    def finish(self, terminal: pytest.TerminalReporter, exitstatus: int, deselected: int) -> None:
        """Write the footer and the files, and print the table. Runs last, whatever happened before."""
        counts = Counter(str(result.verdict) for result in self.results)
        footer = {"exit": int(exitstatus), "results": len(self.results), "counts": dict(counts)}
        self._write(kind="footer", **footer, deselected=deselected)
        columns = by_engine(self.results, self.targets)
        found = faults(columns)
        below = [_not_run(self.results, deselected), *_marks(self.in_process, self.strict, self.seed), *strangers()]
        terminal.section("conformance", sep="=")
        for line in [*as_text(columns), "", *below, *listed(self.results, REASONS_SHOWN)]:
            terminal.write_line(line)
        for name, reason in self.away.items():
            terminal.write_line(f"not judged: {name} ({plain(reason)})")
        if found:
            terminal.section(f"{len(found)} distinct fault{'s' * (len(found) > 1)}", sep="=")
        for line in told(found):
            terminal.write_line(line)
        if self.folder is not None:
            text = markdown(columns, below, self.engines)
            with self._told():
                (self.folder / "summary.md").write_text(text, encoding="utf-8")
        terminal.write_line("")
        terminal.write_line(self._where())
        self.is_finished = True

    def _where(self) -> str:
        """Where the files are, or how to get some."""
        if self.folder is None:
            return "nothing was written; --out FOLDER keeps verdicts.jsonl, summary.md and junit.xml"
        folder = shlex.quote(str(self.folder))
        junit = ", junit.xml" if self.has_junit else ""
        return (
            f"written to {self.folder}: verdicts.jsonl, summary.md{junit}; "
            f"as a page: moe-conformance report {folder} --html report.html"
        )


def by_engine(results: Iterable[Result], engines: Sequence[str]) -> dict[str, list[Result]]:
    """The columns of a run's tables: these engines, and any others that have results."""
    found: dict[str, list[Result]] = {name: [] for name in engines}
    for result in results:
        found.setdefault(result.engine, []).append(result)
    return found


def _not_run(results: Sequence[Result], deselected: int) -> str:
    unsupported = sum(result.verdict is Verdict.UNSUPPORTED for result in results)
    absent = sum(result.verdict is Verdict.ABSENT for result in results)
    unavailable = sum(result.verdict is Verdict.UNAVAILABLE for result in results)
    there = len(results) - absent
    share = (unsupported + unavailable) / there if there else 0.0
    return (
        f"Not judged: {unsupported} unsupported, {unavailable} unavailable "
        f"({share:.0%} of {there} results of what the engine has), {absent} absent from it, {deselected} deselected."
    )


def _marks(in_process: bool, strict: bool, seed: int) -> list[str]:
    """What was unusual about this run."""
    other = f"seed {seed}: inputs are others, and of hashed ones no golden is asked"
    return [IN_PROCESS] * in_process + ["strict: a broken SHOULD fails the run"] * strict + [other] * bool(seed)


def strangers() -> list[str]:
    """A line about families of the installed transformers that no case is of: silence would read as a pass."""
    try:
        found = installed()
    except OSError as error:
        return [f"which families transformers has could not be read: {plain(str(error))}"]
    if found is None or not found.without_record:
        return []
    return [
        f"nothing was judged of families with experts that transformers {found.version} has and no record describes: "
        + ", ".join(found.without_record)
    ]


def markdown(columns: Columns, below: Sequence[str], engines: Mapping[str, Mapping[str, str]]) -> str:
    """The summary for a CI job's page: tables, distinct faults with folded messages, refusals."""
    lines = ["# MoE conformance", ""]
    lines += [f"- {name} {facts['version']} on {facts['device']}" for name, facts in engines.items()]
    lines += ["", *as_markdown(columns), *(f"{line}\n" for line in below)]
    found = faults(columns)
    for title, part in (
        ("Failures", [fault for fault in found if fault.verdict.is_bad]),
        ("Broken SHOULDs", [fault for fault in found if not fault.verdict.is_bad]),
    ):
        if part:
            lines += [f"## {title}", "", *(line for fault in part for line in _folded(fault))]
    if refused := list(listed(result for results in columns.values() for result in results)):
        mark = fence("\n".join(refused))
        lines += ["## Not judged", "", f"{mark}text", *refused, mark]
    return "\n".join(lines) + "\n"


def _folded(fault: Fault) -> list[str]:
    cases, message = fault.cases, fault.first.message
    where = f"{', '.join(fault.columns)} on {cases[0]}" + f" and {len(cases) - 1} more" * (len(cases) > 1)
    others = [f"And of: {', '.join(cases[1:CASES_LISTED])}{', ...' * (len(cases) > CASES_LISTED)}", ""]
    return [
        f"<details><summary>{fault.verdict}: {where} ({fault.bug_class})</summary>",
        "",
        f"{(mark := fence(message))}text",
        message,
        mark,
        "",
        *others * (len(cases) > 1),
        "</details>",
        "",
    ]
