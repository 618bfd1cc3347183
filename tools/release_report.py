"""What was judged of several releases: tables of bug class by release, and each distinct fault in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.faults import faults, words

Releases = Mapping[str, Sequence[Result]]


def fault_lines(releases: Releases, again: Callable[[str, Result], str]) -> Iterator[str]:
    """Three lines for each distinct fault, but for releases that could not be judged.

    again: the command that judges a release's result once more.
    """
    versions = list(releases)
    for fault in faults(releases):
        if fault.verdict is Verdict.UNAVAILABLE:
            continue
        cases = len(fault.cases)
        version, result = fault.hits[-1]
        yield f"{fault.bug_class}: {fault.verdict.replace('_', ' ')}: {fault.check}: {words(result.message)}"
        yield f"    {cases} case{'s' * (cases > 1)}, {_spans(fault.columns, versions)}"
        yield f"    {again(version, result)}"


def _spans(some: Iterable[str], versions: Sequence[str]) -> str:
    """For instance "0.19.0 to 0.22.1, 0.28.0"."""
    places = sorted(versions.index(version) for version in some)
    spans = []
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        members = [versions[place] for _, place in run]
        spans.append(members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}")
    return ", ".join(spans)


def stages(found: Iterable[str]) -> str:
    """How far a run is: results by stage."""
    counts = Counter(found)
    return ", ".join(f"{stage} {count}" for stage, count in sorted(counts.items()))
