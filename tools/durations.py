"""How long each case takes, for shards: python tools/durations.py RESULTS... writes durations.json of the package.

A case's time is that of all its checks, the mean of the engines that answered; of two runs of an engine, the later.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from moe_conformance.catalogue.case import catalogue
from moe_conformance.reporting.stream import read
from moe_conformance.running.shards import DURATIONS


def durations(runs: Sequence[Path]) -> dict[str, int]:
    """Milliseconds, at least one: any item costs about that much."""
    seconds: dict[tuple[str, str], float] = {}
    for run in runs:
        of_run: dict[tuple[str, str], float] = {}
        for result in read(run):
            if result.verdict.was_judged:
                key = result.engine, result.case
                of_run[key] = of_run.get(key, 0.0) + result.seconds
        seconds |= of_run
    by_case: dict[str, list[float]] = {}
    for (_, case), took in seconds.items():
        by_case.setdefault(case, []).append(took)
    return {
        case: max(1, round(1000 * sum(by_case[case]) / len(by_case[case]))) for case in catalogue() if case in by_case
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders of `moe-conformance run --out`, older ones first"
    )
    found = durations(parser.parse_args().results)
    lines = ",\n".join(f"{json.dumps(case)}: {took}" for case, took in sorted(found.items()))
    DURATIONS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{len(found)} of {len(catalogue())} cases, {sum(found.values()) / 1000:.0f} s: {DURATIONS}")


if __name__ == "__main__":
    main()
