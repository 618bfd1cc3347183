"""`moe-conformance doctor`: what is here to judge with, and what is not.

Engines answer at the same time, each in a process of its own; everything else is found out meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from moe_conformance import __version__
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.installed import installed
from moe_conformance.reporting.facts import run_facts
from moe_conformance.running.discovery import registered
from moe_conformance.running.survey import surveys

# The loop that times the machine. 4 to 8 ms on the machines that this was written on.
ADDITIONS = 100_000
TRIES = 3


def doctor(every_family: bool) -> Iterator[str]:
    """The report, line by line. every_family: list the families that have a record, too."""
    # Before engines are asked, because they load the machine.
    speed = fastest_loop()
    found = dict(sorted(registered().items()))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(surveys, list(found.values()))
        facts = run_facts()
        yield f"moe-conformance {__version__} on Python {facts.pop('python')}, {facts.pop('platform')}"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        yield f"machine: {os.cpu_count()} cores, {memory:.0f} GiB, {facts.pop('gpus') or 'no'} GPU"
        yield f"speed: {ADDITIONS:,} additions in a Python loop take {speed * 1000:.1f} ms (best of {TRIES})"
        yield "installed: " + ", ".join(f"{name} {version or '(missing)'}" for name, version in facts.items())
        families = list(_families(every_family))
        yield ""
        yield "engines"
        answers = asked.result()
    for (name, target), survey in zip(found.items(), answers, strict=True):
        stages = f"starts, {len(survey.stages)} stages" if survey.why is None else f"does not start: {survey.why}"
        first, *more = stages.splitlines()
        yield f"  {name:14} {target.path:50} {first}"
        yield from (f"  {'':14} {line}" for line in more)
    if not found:
        yield "  (none is registered)"
    yield from families


def fastest_loop() -> float:
    """Seconds. The fastest of a few tries shows the machine; the slower ones show its other load."""

    def loop() -> float:
        started, total = time.perf_counter(), 0
        for number in range(ADDITIONS):
            total += number
        return time.perf_counter() - started

    return min(loop() for _ in range(TRIES))


def _families(every_one: bool) -> Iterator[str]:
    there = installed()
    yield ""
    yield f"families: {len(RECORDS)} have a record, and are judged as far as an engine has them" + (
        "" if every_one else " (--families lists them)"
    )
    for record in RECORDS.values() if every_one else ():
        away = "" if there is None or record.model_type in there.all else f"; not in transformers {there.version}"
        yield f"  {record.slug:24} {record.model_type:28} {record.covers}{away}"
    if there is None:
        yield "  transformers is not installed: whether it has others cannot be said"
    elif there.without_record:
        yield ""
        yield f"families of transformers {there.version} without a record, of which nothing is judged"
        yield from (f"  {name:53} {there.experts[name]}" for name in there.without_record)
