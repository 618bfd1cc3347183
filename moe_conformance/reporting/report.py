"""What a run leaves behind: the verdict stream, the Markdown summary, and the table at the end."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import pytest

from moe_conformance import __version__
from moe_conformance.catalogue.case import catalogue
from moe_conformance.catalogue.clauses import BUG_CLASSES, Level
from moe_conformance.errors import UsageError
from moe_conformance.judging.plain import fence, plain
from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.model.families.installed import installed
from moe_conformance.protocol.stages import PROTOCOL_VERSION
from moe_conformance.reporting.refusals import listed
from moe_conformance.running.devices import gpu_count
from moe_conformance.running.discovery import Target

IN_PROCESS = "in process: checks ran in pytest's own process, where a crash or a hang is no verdict"
# Reasons of refusals that the terminal shows of an engine and kind; summary.md has all.
REASONS_SHOWN = 8


def run_facts() -> dict[str, Any]:
    """Where a run happens, found without importing anything heavy."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "safetensors", "pytest"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "gpus": gpu_count(), **packages}


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
        """about: more for the header, or other values for what stands in it."""
        self.targets = [target.name for target in targets]
        self.away = away
        self.cases = cases
        self.in_process = bool(config.getoption("--moe-in-process"))
        self.strict = bool(config.getoption("--moe-strict"))
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
        """After a line that could not be written none is, so that the stream has no footer and is not whole."""
        if self._stream is not None:
            with self._told():
                self._stream.write(json.dumps(line) + "\n")
                self._stream.flush()
            if self.troubles:
                self._stream = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk costs files, and no verdict."""
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
        """A pytest worker that died, a test that broke before it could judge, or one that nobody heard of again."""
        check, _, rest = nodeid.rpartition("::")[2].removeprefix("test_").partition("[")
        engine = max((name for name in self.targets if rest.startswith(f"{name}-")), key=len, default="?")
        case = catalogue().get(name := rest.removeprefix(f"{engine}-").removesuffix("]"))
        bug_class, stage = (case.bug_class, case.stage) if case else ("?", "?")
        self.add(Result(engine, name, check, bug_class, stage, Verdict.ERROR, plain(message)), {})

    def finish(self, terminal: pytest.TerminalReporter, exitstatus: int, deselected: int) -> None:
        """Write the footer and files, and print the table. Runs last, whatever happened before."""
        counts = Counter(str(result.verdict) for result in self.results)
        footer = {"exit": int(exitstatus), "results": len(self.results), "counts": dict(counts)}
        self._write(kind="footer", **footer, deselected=deselected)
        rows = table(self.results, self.targets)
        below = [_not_run(self.results, deselected), *_marks(self.in_process, self.strict), *strangers()]
        terminal.section("conformance", sep="=")
        for line in [*_aligned(rows), *below, *listed(self.results, REASONS_SHOWN)]:
            terminal.write_line(line)
        for name, reason in self.away.items():
            terminal.write_line(f"not judged: {name} ({plain(reason)})")
        if self.folder is not None:
            text = markdown(self.results, rows, below, self.engines)
            with self._told():
                (self.folder / "summary.md").write_text(text, encoding="utf-8")
        self.is_finished = True


def table(results: Iterable[Result], engines: Sequence[str]) -> list[list[str]]:
    """Rows of engine by bug class; a cell says passed of judged, and what else there is."""
    cells: dict[tuple[str, str], Counter[tuple[Level, Verdict]]] = {}
    for result in results:
        cells.setdefault((result.engine, result.bug_class), Counter())[result.level, result.verdict] += 1
    # "?": of what was lost before anybody knew its class.
    classes = [name for name in (*BUG_CLASSES, "?") if any(bug_class == name for _, bug_class in cells)]
    shown = [*engines, *sorted({engine for engine, _ in cells} - {*engines})]
    rows = [["engine", *classes]]
    rows += [[engine, *(_cell(cells.get((engine, name), Counter())) for name in classes)] for engine in shown]
    return rows


def _cell(counts: Counter[tuple[Level, Verdict]]) -> str:
    """For instance "11/12, 1 fail; should 2/3, 1 broken": 11 of 12 MUSTs passed that were judged, 2 of 3 SHOULDs."""
    if not counts:
        return "-"
    must = _share({verdict: count for (level, verdict), count in counts.items() if level == "MUST"})
    should = _share({verdict: count for (level, verdict), count in counts.items() if level == "SHOULD"})
    return "; ".join([must] * bool(must) + [f"should {should}"] * bool(should)) or "unsupported"


def _share(counts: Mapping[Verdict, int]) -> str:
    """Passed of judged, and what else there is; empty where there is nothing but unsupported."""
    judged = sum(count for verdict, count in counts.items() if verdict.was_judged)
    others = [
        f"{count} {'broken' if verdict is Verdict.BROKEN_SHOULD else verdict.replace('_', ' ')}"
        for verdict, count in sorted(counts.items())
        if verdict not in (Verdict.PASS, Verdict.UNSUPPORTED)
    ]
    return ", ".join([f"{counts.get(Verdict.PASS, 0)}/{judged}"] * bool(judged) + others)


def _not_run(results: Sequence[Result], deselected: int) -> str:
    unsupported = sum(result.verdict is Verdict.UNSUPPORTED for result in results)
    unavailable = sum(result.verdict is Verdict.UNAVAILABLE for result in results)
    share = (unsupported + unavailable) / len(results) if results else 0.0
    return (
        f"cells: passed/judged. Not judged: {unsupported} unsupported, {unavailable} unavailable "
        f"({share:.0%} of {len(results)} results), {deselected} deselected."
    )


def _marks(in_process: bool, strict: bool) -> list[str]:
    """What was not as in a usual run."""
    return [IN_PROCESS] * in_process + ["strict: a broken SHOULD fails the run"] * strict


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


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(
    results: Sequence[Result],
    rows: Sequence[Sequence[str]],
    below: Sequence[str],
    engines: Mapping[str, Mapping[str, str]],
) -> str:
    """A summary that fits a CI job's page: the table, every bad result with its message folded, broken SHOULDs apart,
    and what was not judged."""
    lines = ["# MoE conformance", ""]
    lines += [f"- {name} {facts['version']} on {facts['device']}" for name, facts in engines.items()]
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows[:1]), "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    lines += ["", *(f"{line}\n" for line in below)]
    for result in results:
        if result.verdict.is_bad:
            lines += _folded(result)
    if broken := [result for result in results if result.verdict is Verdict.BROKEN_SHOULD]:
        lines += ["## Broken SHOULDs", ""]
        for result in broken:
            lines += _folded(result)
    if refused := list(listed(results)):
        mark = fence("\n".join(refused))
        lines += ["## Not judged", "", f"{mark}text", *refused, mark]
    return "\n".join(lines) + "\n"


def _folded(result: Result) -> list[str]:
    return [
        f"<details><summary>{result.verdict}: {result.engine} on {result.case} ({result.bug_class})</summary>",
        "",
        f"{(mark := fence(result.message))}text",
        result.message,
        mark,
        "",
        "</details>",
        "",
    ]
