"""What a run leaves behind: the verdict stream, the Markdown summary, and the table at the end."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import pytest

from moe_conformance import __version__
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.running.devices import gpu_count
from moe_conformance.running.discovery import Target, missing, registered


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

    def __init__(self, config: pytest.Config, targets: Sequence[Target], cases: int) -> None:
        self.targets = [target.name for target in targets]
        self.cases = cases
        self.results: list[Result] = []
        self.engines: dict[str, Mapping[str, str]] = {}
        self.folder = Path(config.getoption("--moe-out")) if config.getoption("--moe-out") else None
        self._stream: TextIO | None = None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stream = (self.folder / "verdicts.jsonl").open("w", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--out: cannot write to {self.folder}: {error}") from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(kind="header", suite=__version__, engines=self.targets, cases=cases, started=started, **run_facts())

    def _write(self, **line: Any) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()

    def add(self, result: Result, facts: Mapping[str, str]) -> None:
        if facts and result.engine not in self.engines:
            self.engines[result.engine] = facts
            self._write(kind="engine", engine=result.engine, **facts)
        self.results.append(result)
        self._write(**result.as_line())

    def lost(self, nodeid: str, message: str) -> None:
        """A pytest worker that died, or a test that broke before it could judge."""
        name = nodeid.rpartition("::")[2]
        check, _, rest = name.removeprefix("test_").partition("[")
        engine = next((target for target in self.targets if rest.startswith(target + "-")), "?")
        case = rest.removeprefix(engine + "-").removesuffix("]")
        self.add(Result(engine, case, check, "?", "?", Verdict.ERROR, message), {})

    def finish(self, terminal: pytest.TerminalReporter, exitstatus: int) -> None:
        """Write the footer and files, and print the table. Runs last, whatever happened before."""
        counts = Counter(str(result.verdict) for result in self.results)
        deselected = len(terminal.stats.get("deselected", []))
        self._write(kind="footer", exit=int(exitstatus), results=len(self.results), counts=dict(counts))
        if self._stream is not None:
            self._stream.close()
        rows = table(self.results, self.targets)
        not_run = _not_run(self.results, deselected)
        terminal.section("conformance", sep="=")
        for line in _aligned(rows):
            terminal.write_line(line)
        terminal.write_line(not_run)
        for name, target in registered().items():
            if name not in self.targets and (reason := missing(target)):
                terminal.write_line(f"not judged: {name} ({reason})")
        if self.folder is not None:
            (self.folder / "summary.md").write_text(
                markdown(self.results, rows, not_run, self.engines), encoding="utf-8"
            )


def table(results: Iterable[Result], engines: Sequence[str]) -> list[list[str]]:
    """Rows of engine by bug class; a cell says passed of judged, and what else there is."""
    cells: dict[tuple[str, str], Counter[Verdict]] = {}
    for result in results:
        cells.setdefault((result.engine, result.bug_class), Counter())[result.verdict] += 1
    classes = [name for name in BUG_CLASSES if any(bug_class == name for _, bug_class in cells)]
    rows = [["engine", *classes]]
    rows += [[engine, *(_cell(cells.get((engine, name), Counter())) for name in classes)] for engine in engines]
    return rows


def _cell(counts: Counter[Verdict]) -> str:
    """For instance "11/12, 1 fail": 11 of 12 judged passed."""
    if not counts:
        return "-"
    judged = sum(count for verdict, count in counts.items() if verdict.was_judged)
    others = [
        f"{count} {verdict.replace('_', ' ')}"
        for verdict, count in sorted(counts.items())
        if verdict not in (Verdict.PASS, Verdict.UNSUPPORTED)
    ]
    share = [f"{counts[Verdict.PASS]}/{judged}"] if judged else []
    return ", ".join(share + others) or "unsupported"


def _not_run(results: Sequence[Result], deselected: int) -> str:
    unsupported = sum(result.verdict is Verdict.UNSUPPORTED for result in results)
    unavailable = sum(result.verdict is Verdict.UNAVAILABLE for result in results)
    share = (unsupported + unavailable) / len(results) if results else 0.0
    return (
        f"cells: passed/judged. Not judged: {unsupported} unsupported, {unavailable} unavailable "
        f"({share:.0%} of {len(results)} results), {deselected} deselected."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(
    results: Sequence[Result], rows: Sequence[Sequence[str]], not_run: str, engines: Mapping[str, Mapping[str, str]]
) -> str:
    """A summary that fits a CI job's page: the table, then every bad result, its message folded."""
    lines = ["# MoE conformance", ""]
    lines += [f"- {name} {facts['version']} on {facts['device']}" for name, facts in engines.items()]
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows[:1]), "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    lines += ["", not_run, ""]
    for result in (result for result in results if result.verdict.is_bad):
        lines += [
            f"<details><summary>{result.verdict}: {result.engine} on {result.case} ({result.bug_class})</summary>",
            "",
            "```text",
            result.message,
            "```",
            "",
            "</details>",
        ]
    return "\n".join(lines) + "\n"
