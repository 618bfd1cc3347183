"""Shards of one run, joined: one verdict stream, one table, one exit code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result
from moe_conformance.quote import quoted
from moe_conformance.reporting.report import Report
from moe_conformance.reporting.stream import read
from moe_conformance.running.accounts import unjudged
from moe_conformance.running.discovery import Target
from moe_conformance.running.shards import Shard

# Header keys on which the shards of one run must agree.
_SAME = ("suite", "protocol", "selection", "engines", "chosen", "strict", "in_process")


@dataclass(frozen=True)
class _Part:
    """The results of a shard, with the lines around them."""

    path: Path
    header: Mapping[str, Any]
    facts: Mapping[str, Mapping[str, str]]
    results: Sequence[Result]
    footer: Mapping[str, Any]

    @property
    def number(self) -> int:
        return int(self.header["shard"]["number"])

    @property
    def of(self) -> int:
        return int(self.header["shard"]["of"])

    @property
    def is_bad(self) -> bool:
        worst = 1 if self.header["strict"] else 2
        return any(result.verdict.badness >= worst for result in self.results)


def merge(paths: Sequence[Path], out: Path) -> int:
    """Write what one run would have left in the folder `out`, print its table, and return its exit code.

    What cannot be joined is reported, and the rest is shown; the exit code is then 1. Raises UsageError if nothing is
    left.
    """
    for path in paths:
        if out.resolve() in (path.resolve(), path.resolve().parent):
            raise UsageError(f"--out: got {out}, which is one of the results; name another folder")
    complaints: list[str] = []
    parts: list[_Part] = []
    for path in paths:
        try:
            part = _part(path)
            _joins(part, parts)
        except UsageError as error:
            complaints.append(f"left out: {error}")
        else:
            parts.append(part)
    if not parts:
        raise UsageError("\n".join(complaints))
    parts.sort(key=lambda part: part.number)
    complaints += _missing(parts)
    return _write(parts, out, complaints)


def _part(path: Path) -> _Part:
    """Raises UsageError if it is not a whole run, or not a shard."""
    results = read(path)
    file = path / "verdicts.jsonl" if path.is_dir() else path
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    header, footer = lines[0], lines[-1]
    shard = header.get("shard")
    if not isinstance(shard, dict):
        raise UsageError(
            f"{path}: got shard {quoted(shard)}, want the results of `moe-conformance run --shard 1/2 --out`"
        )
    try:
        Shard.parse(f"{shard.get('number')}/{shard.get('of')}")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    wanted = dict.fromkeys(_SAME, object) | {"selection": dict, "engines": list, "cases": int}
    if wrong := [key for key, kind in wanted.items() if key not in header or not isinstance(header[key], kind)]:
        raise UsageError(f"{path}: got a header without {', '.join(wrong)}, want the results of a run of this release")
    if footer.get("results") != len(results):
        counted = quoted(footer.get("results"))
        raise UsageError(f"{path}: got {len(results)} results, want {counted}, as its footer counts; run it again")
    facts = {
        str(line.get("engine")): {key: str(value) for key, value in line.items() if key not in ("kind", "engine")}
        for line in lines
        if line["kind"] == "engine"
    }
    return _Part(path, header, facts, results, footer)


def _joins(part: _Part, parts: Sequence[_Part]) -> None:
    """Raises UsageError where this shard is not of the run of the others."""
    for other in parts:
        if part.of != other.of:
            raise UsageError(f"{part.path}: got a shard of {part.of}, want one of {other.of}, as {other.path} is")
        if part.number == other.number:
            raise UsageError(
                f"{part.path}: got shard {part.number}/{part.of}, which {other.path} is, too; give one of them"
            )
        for key in _SAME:
            if part.header[key] != other.header[key]:
                raise UsageError(
                    f"{part.path}: {key}: got {quoted(part.header[key])}, want {quoted(other.header[key])}, as in "
                    f"{other.path}; run the shards by one release, with the same options"
                )
        for engine in part.facts.keys() & other.facts.keys():
            got, want = part.facts[engine], other.facts[engine]
            if got != want:
                raise UsageError(
                    f"{part.path}: {engine}: got {quoted(got)}, want {quoted(want)}, as in {other.path}; install the "
                    "same engine on each machine"
                )


def _missing(parts: Sequence[_Part]) -> list[str]:
    """What makes the whole run bad although no result is bad."""
    of, there = parts[0].of, {part.number for part in parts}
    found = [f"shard {number}/{of} is missing" for number in range(1, of + 1) if number not in there]
    for part in parts:
        if (code := part.footer.get("exit")) and not part.is_bad:
            found.append(f"shard {part.number}/{of}: its run ended with exit code {code}, and no result says why")
    cases, total = sum(part.header["cases"] for part in parts), parts[0].header["selection"].get("total")
    if not found and cases != total:
        found.append(f"the shards have {cases} cases together, want {total}: they were not split alike; run them again")
    return found


def _write(parts: Sequence[_Part], out: Path, complaints: list[str]) -> int:
    first = parts[0].header
    engines, order = list(first["engines"]), {case: number for number, case in enumerate(catalogue())}
    results = [result for part in parts for result in part.results]
    # In the order in which one process would have judged them. The case of a lost result may be unknown.
    results.sort(
        key=lambda each: (engines.index(each.engine) if each.engine in engines else -1, order.get(each.case, -1))
    )
    complaints += unjudged(results, first["chosen"])
    is_bad, cases = bool(complaints) or any(part.is_bad for part in parts), sum(part.header["cases"] for part in parts)
    options = {"--moe-in-process": first["in_process"], "--moe-strict": first["strict"], "--moe-out": str(out)}
    report = Report(
        cast(Any, _Options(options)),
        [Target(str(name), "") for name in engines],
        {name: str(why) for name, why in away.items()} if isinstance(away := first.get("away"), dict) else {},
        cases,
        {**first, "cases": cases, "shard": None, "merged": len(parts)},
    )
    facts = {engine: about for part in parts for engine, about in part.facts.items()}
    for result in results:
        report.add(result, facts.get(result.engine, {}))
    deselected = sum(count for part in parts if isinstance(count := part.footer.get("deselected"), int))
    report.finish(cast(Any, _Printed()), int(is_bad), deselected)
    for line in [*complaints, *report.troubles]:
        print(line)
    counts = Counter(str(result.verdict) for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(is_bad or bool(report.troubles))


@dataclass(frozen=True)
class _Options:
    """Takes the place of pytest's config."""

    options: Mapping[str, Any]

    def getoption(self, name: str, default: Any = None) -> Any:
        return self.options.get(name, default)


class _Printed:
    """Takes the place of pytest's terminal reporter."""

    def section(self, title: str, sep: str = "=") -> None:
        print(f" {title} ".center(80, sep))

    def write_line(self, line: str, **_: bool) -> None:
        print(line)
