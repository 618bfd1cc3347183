"""Runs as one HTML file that works from disk without a network, and as a badge.

The page holds its results as gzipped JSON in columns, with every text once; a script of its own (templates/report.js)
filters and shows them. Foreign text reaches the page in that JSON or through Jinja's escaping, and nowhere else.
"""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from moe_conformance import __version__
from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.catalogue.clauses import BUG_CLASSES, CLAUSES
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Verdict
from moe_conformance.reporting.explain import spelled
from moe_conformance.reporting.faults import Fault, command, faults, own_words, told
from moe_conformance.reporting.runs import Column, Run, columns, in_short
from moe_conformance.reporting.tables import KINDS, as_markdown, as_text, cells, kind
from moe_conformance.reporting.threads import address
from moe_conformance.repro import STAGES

T = TypeVar("T")
_TEMPLATES = Path(__file__).with_name("templates")
# Size of a page that a mail server and a phone still accept.
MOST_BYTES = 20_000_000
# Characters of one message, tried in turn until the page is small enough for a browser to open quickly.
_FOLDS = (4000, 1000, 400, 150, 60)
_MOST_CHARACTERS = 32_000_000
_MARKS = {Verdict.PASS: "✓", Verdict.BROKEN_SHOULD: "~", Verdict.KNOWN_FAILURE: "≈", Verdict.UNSUPPORTED: "○"}


def write(runs: Sequence[Run], page: Path | None, text_page: Path | None, image: Path | None) -> Iterator[str]:
    """Write what is asked for; returns a line for each file. Raises UsageError if a file cannot be written."""
    for file, make in ((page, html), (text_page, markdown), (image, badge)):
        if file is None:
            continue
        text = make(runs)
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{file}: cannot be written: {error}") from error
        yield f"{file}: {sum(len(run.results) for run in runs)} results, {len(text.encode()) / 1e6:.2f} MB"


def html(runs: Sequence[Run]) -> str:
    """The page. Raises UsageError where Jinja2 is missing."""
    shown = columns(runs)
    by_label = {column.label: column.results for column in shown}
    found = faults(by_label)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    return _rendered(
        "report.html.j2",
        version=__version__,
        runs=[(run, _facts(run)) for run in runs],
        columns=shown,
        lines=_lines(shown),
        fallback="\n".join([*as_text(by_label), *told(found)]),
        script=script,
        # The browser runs this script only, not one that a message might contain.
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        data=_packed(runs, shown, found),
    )


def markdown(runs: Sequence[Run]) -> str:
    """The tables of all runs."""
    return "\n".join(as_markdown({column.label: column.results for column in columns(runs)}))


def badge(runs: Sequence[Run]) -> str:
    """An SVG that shows how many MUSTs hold, of how many."""
    shown = columns(runs)
    counted = cells({column.label: column.results for column in shown})
    musts = [cell.must for row in counted.values() for cell in row.values()]
    judged, bad = sum(count.all for count in musts), sum(count.bad for count in musts)
    engines = list(dict.fromkeys(column.engine for column in shown))
    said = f"{judged - bad}/{judged} MUST" if judged else "not judged"
    if any("cut off" in trouble for run in runs for trouble in run.troubles):
        said += ", cut off"
    mark, colour = ("○", "#5d6570") if not judged else ("✗", "#b3261e") if bad else ("✓", "#1a7f37")
    name = f"MoE conformance{f' of {engines[0]}' if len(engines) == 1 else ''}"
    return _rendered("badge.svg.j2", name=name[:60], said=f"{mark} {said}", colour=colour)


def _rendered(template: str, /, **values: Any) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("report: got no Jinja2, want it installed: pip install 'moe-conformance[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _facts(run: Run) -> str:
    """When and where it ran, for instance "2026-11-30, suite 0.1.0, Python 3.11.7, torch 2.13.0"."""
    names = {"started": "", "suite": "suite ", "python": "Python ", "platform": "", "gpus": "GPUs: "}
    names |= {package: f"{package} " for package in ("torch", "triton", "transformers")}
    return ", ".join(
        f"{title}{in_short(run.header[key])}" for key, title in names.items() if run.header.get(key) is not None
    )


@dataclass(frozen=True)
class _Line:
    """The releases of an engine: how many MUSTs failed in each. points: x, y, version, failed, judged."""

    engine: str
    points: tuple[tuple[int, int, str, int, int], ...]
    width: int

    @property
    def path(self) -> str:
        return " ".join(f"{x},{y}" for x, y, *_ in self.points)


def _lines(shown: Sequence[Column]) -> list[_Line]:
    """One line for each engine that appears in several versions or runs."""
    made = []
    for engine in dict.fromkeys(column.engine for column in shown):
        own = [column for column in shown if column.engine == engine]
        if len(own) < 2:
            continue
        musts = [[result for result in column.results if kind(result) == "must"] for column in own]
        failed = [sum(result.verdict.badness > 0 for result in results) for results in musts]
        step, height, worst = 84, 60, max(1, *failed)
        points = [
            (42 + step * n, 24 + height - height * bad // worst, own[n].version or own[n].run, bad, len(musts[n]))
            for n, bad in enumerate(failed)
        ]
        made.append(_Line(engine, tuple(points), step * len(own)))
    return made


class _Interned(Generic[T]):
    """Values in the order in which they first appear, each once."""

    def __init__(self) -> None:
        self.places: dict[T, int] = {}

    def __call__(self, value: T) -> int:
        return self.places.setdefault(value, len(self.places))

    def all(self) -> list[T]:
        return list(self.places)


def _packed(runs: Sequence[Run], shown: Sequence[Column], found: Sequence[Fault]) -> str:
    """The data as base64 of gzipped JSON, messages folded until it fits."""
    data, messages = _data(runs, shown, found)
    packed = b""
    for most in _FOLDS:
        folded = [_folded(message, most) for message in messages]
        if sum(map(len, folded)) > _MOST_CHARACTERS and most != _FOLDS[-1]:
            continue
        text = json.dumps({**data, "messages": folded}, ensure_ascii=False, separators=(",", ":"))
        packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0))
        if len(packed) < 0.9 * MOST_BYTES:
            break
    return packed.decode()


def _folded(message: str, most: int) -> str:
    if len(message) <= most:
        return message
    return (
        f"{message[: most // 2]}\n... {len(message) - most} characters left out ...\n{message[-(most - most // 2) :]}"
    )


def _data(runs: Sequence[Run], shown: Sequence[Column], found: Sequence[Fault]) -> tuple[dict[str, Any], Sequence[str]]:
    cases: _Interned[tuple[str, str, str]] = _Interned()
    checks: _Interned[str] = _Interned()
    messages: _Interned[str] = _Interned()
    verdicts, kinds = list(Verdict), list(KINDS)
    fault_of = {id(result): number for number, fault in enumerate(found) for _, result in fault.hits}
    rows: dict[str, list[int | float]] = {
        key: [] for key in ("column", "case", "check", "verdict", "kind", "message", "fault", "ms")
    }
    for number, column in enumerate(shown):
        for result in column.results:
            rows["column"].append(number)
            rows["case"].append(cases((result.case, result.stage, result.bug_class)))
            rows["check"].append(checks(result.check))
            rows["verdict"].append(verdicts.index(result.verdict))
            rows["kind"].append(kinds.index(kind(result)))
            rows["message"].append(messages(own_words(result.message)))
            rows["fault"].append(fault_of.get(id(result), -1))
            rows["ms"].append(round(result.seconds * 1000))
    clauses: _Interned[str] = _Interned()
    headers = {run.name: run.header for run in runs}
    data = {
        "columns": [
            {
                "label": c.label,
                "engine": c.engine,
                "version": c.version,
                "device": c.device,
                "run": c.run,
                "asked": _asked_as(c),
                "seed": _seed(headers[c.run]),
            }
            for c in shown
        ],
        "runs": [run.name for run in runs],
        "verdicts": [
            {"name": v.value, "mark": _MARKS.get(v, "✗"), "badness": v.badness, "judged": v.was_judged}
            for v in verdicts
        ],
        "kinds": list(KINDS.items()),
        "order": list(BUG_CLASSES),
        "cases": [_case(*known, clauses) for known in cases.all()],
        "checks": [check.replace("_", " ") for check in checks.all()],
        "faults": [f"{fault.bug_class}: {fault.check.replace('_', ' ')}" for fault in found],
        "rows": rows,
    }
    data["clauses"] = [_clause(name) for name in clauses.all()]
    return data, messages.all()


def _asked_as(column: Column) -> str:
    """The engine as --engine takes it, which for one that is not registered is a path."""
    for result in column.results:
        if result.verdict.badness and (said := command(result)):
            return said.partition(" --engine ")[2].rpartition(" --case ")[0]
    return shlex.quote(column.engine)


def _seed(header: Mapping[str, Any]) -> int:
    """The run's; 0, the default, if the header has none."""
    selection = header.get("selection")
    seed = selection.get("seed") if isinstance(selection, dict) else None
    return seed if isinstance(seed, int) else 0


def _case(name: str, stage: str, bug_class: str, clauses: Callable[[str], int]) -> dict[str, Any]:
    case: Case | None = catalogue().get(name)
    if case is None:
        return {"id": name, "stage": stage, "class": bug_class, "clause": -1}
    return {
        "id": name,
        "stage": stage,
        "class": bug_class,
        "clause": clauses(case.clause),
        "tier": case.tier,
        "level": case.level,
        "lenient": case.lenient,
        "repro": stage in STAGES,
        "recipe": [f"{key} = {spelled(value)}" for key, value in case.recipe.items()],
    }


def _clause(name: str) -> Mapping[str, Any]:
    clause = CLAUSES[name]
    threads = [[thread, address(thread)] for thread in clause.upstream]
    return {"id": name, "class": clause.bug_class, "text": clause.text, "level": clause.level, "threads": threads}
