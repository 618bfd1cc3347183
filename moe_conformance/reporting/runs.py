"""Reads what several runs left, as far as possible: faults of a stream are reported, and the rest is kept.

`diff` reads with stream.py instead, which refuses a run that is not whole: a missing result would pass for a change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from moe_conformance import __version__
from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.judging.plain import plain
from moe_conformance.judging.verdict import Result
from moe_conformance.protocol.stages import PROTOCOL_VERSION
from moe_conformance.quote import few, plainly, quoted
from moe_conformance.reporting.stream import result_of

STREAM = "verdicts.jsonl"


@dataclass
class Run:
    """name: under which it is shown, unique.

    header: of its stream, as far as it exists. engines: name -> version and device. troubles: why results are missing,
    a sentence each.
    """

    name: str
    header: Mapping[str, Any] = field(default_factory=dict)
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """One engine in one run. version: empty where the engine never started."""

    label: str
    engine: str
    version: str
    device: str
    run: str
    results: tuple[Result, ...]


def gather(paths: Sequence[Path]) -> list[Run]:
    """The runs of these files, of these folders, or of the folders in them.

    Raises UsageError where there is nothing to show: no stream, or no result in any.
    """
    runs: list[Run] = []
    seen: dict[str, Run] = {}
    for file in [file for path in paths for file in _streams(path)]:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error}") from error
        key = sha256(content).hexdigest()
        if (twin := seen.get(key)) is not None:
            twin.troubles.append(f"given twice, also as {file}; shown once")
            continue
        name = file.resolve().parent.name if file.name == STREAM else file.stem
        taken = {run.name for run in runs}
        unique = next(n for n in (name, *(f"{name} ({k})" for k in range(2, len(runs) + 3))) if n not in taken)
        runs.append(_salvaged(unique, content.decode("utf-8", "replace")))
        seen[key] = runs[-1]
    if not any(run.results for run in runs):
        said = "; ".join(f"{run.name}: {trouble}" for run in runs for trouble in run.troubles)
        raise UsageError(f"got no result ({said}), want a folder that `moe-conformance run --out FOLDER` has written")
    return runs


def _streams(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / STREAM).is_file():
        return [path / STREAM]
    if found := sorted(path.glob(f"*/{STREAM}")):
        return found
    what = f"a folder without {STREAM}" if path.is_dir() else "nothing"
    raise UsageError(f"{path}: got {what}, want a folder that `moe-conformance run --out FOLDER` has written")


def _salvaged(name: str, text: str) -> Run:
    """All that can be read of a stream."""
    run = Run(name)
    headers = footers = counted = doubled = 0
    strange: list[str] = []
    seen: set[str] = set()
    protocol = 1
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            match said["kind"]:
                case "header":
                    headers, protocol = headers + 1, int(said.get("protocol", 1))
                    run.header = run.header or said
                case "engine":
                    run.engines[_text(said["engine"])] = {key: _text(said[key]) for key in ("version", "device")}
                case "footer":
                    footers, counted = footers + 1, counted + int(said["results"])
                case "result" if line in seen:
                    doubled += 1
                case "result":
                    seen.add(line)
                    run.results.append(_checked(result_of(said, protocol)))
                case other:
                    raise ValueError(f"kind: got {other!r}")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            strange.append(f"line {number}: {type(error).__name__}: {plainly(str(error))}")
    run.troubles += _troubles(run, headers, footers, counted, doubled, strange)
    return run


def _checked(result: Result) -> Result:
    """The result with encodable text. Raises ValueError if a field has the wrong type."""
    names = ("engine", "case", "check", "bug_class", "stage", "message")
    texts: dict[str, Any] = {name: _text(getattr(result, name)) for name in names}
    if result.level not in ("MUST", "SHOULD"):
        raise ValueError(f"level: got {result.level!r}")
    if type(result.seconds) not in (int, float) or not 0 <= result.seconds < 1e9:  # neither NaN nor beyond a float
        raise ValueError(f"seconds: got {result.seconds!r}")
    return replace(result, **texts)


def in_short(value: object) -> str:
    """A header's value as short text, whatever its type."""
    return plainly(value) if isinstance(value, str) else quoted(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {value!r}, want a string")
    return plain(value)


def _troubles(
    run: Run, headers: int, footers: int, counted: int, doubled: int, strange: Sequence[str]
) -> Iterator[str]:
    if not headers:
        yield "it has no header: which suite wrote it is not known"
    elif (suite := run.header.get("suite")) != __version__:
        yield f"written by suite {in_short(suite)}, read by {__version__}: cases may have come, gone or changed"
    if headers and (protocol := run.header.get("protocol", 1)) != PROTOCOL_VERSION:
        yield f"written by protocol {in_short(protocol)}, read by {PROTOCOL_VERSION}"
    if headers > 1 or footers > 1:
        yield f"{max(headers, footers)} runs in one file, shown as one"
    if not footers:
        yield "cut off: it has no footer, for the run died before its end; what it had judged until then is shown"
    elif counted != len(run.results) + doubled:
        yield f"the footer counts {counted} results, {len(run.results)} are here"
    if doubled:
        yield f"{doubled} results are written twice; each is shown once"
    if strange:
        yield f"{len(strange)} lines are no part of a verdict stream, the first is {strange[0]}"
    if others := sorted({result.case for result in run.results} - catalogue().keys()):
        yield (
            f"{len(others)} cases are none of this suite, of another version or another suite; they are shown without "
            f"clause and inputs: {few(others)}"
        )


def columns(runs: Sequence[Run]) -> list[Column]:
    """Engines in the order in which they come, each by version."""
    found: list[Column] = []
    for run in runs:
        by_engine: dict[str, list[Result]] = {}
        for result in run.results:
            by_engine.setdefault(result.engine, []).append(result)
        for engine, results in by_engine.items():
            facts = run.engines.get(engine, {"version": "", "device": ""})
            found.append(Column("", engine, facts["version"], facts["device"], run.name, tuple(results)))
    engines = list(dict.fromkeys(column.engine for column in found))
    found.sort(key=lambda column: (engines.index(column.engine), _order(column.version)))
    plain_labels = [f"{column.engine} {column.version}".strip() for column in found]
    return [
        replace(column, label=label if plain_labels.count(label) == 1 else f"{label} ({column.run})")
        for column, label in zip(found, plain_labels, strict=True)
    ]


def _order(version: str) -> tuple[bool, Version]:
    """Invalid versions come last."""
    try:
        return False, Version(version)
    except InvalidVersion:
        return True, Version("0")
