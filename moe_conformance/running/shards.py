"""Which cases each shard of a run has: the same on every machine, all shards about equally long."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe_conformance.errors import UsageError

# Case id -> milliseconds, measured; tools/durations.py writes it. Integers, so that sums are the same everywhere.
DURATIONS = Path(__file__).with_name("durations.json")


@dataclass(frozen=True)
class Shard:
    """One of several runs that together are one. number: from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "3/8". Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"--shard: got {text!r}, want NUMBER/COUNT, from 1/8 to 8/8 for instance")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def pick(self, cases: Iterable[str], durations: Mapping[str, int] | None = None) -> frozenset[str]:
        """The shard's part of these cases.

        The longest case is assigned first, to the shard with the least work. A case that was never measured is assigned
        by its hash, so that it moves no other.
        """
        durations = measured() if durations is None else durations
        there = set(cases)
        known = sorted(there & durations.keys(), key=lambda case: (-durations[case], case))
        loads = [(0, number) for number in range(1, self.of + 1)]
        mine = {case for case in there - durations.keys() if _hash(case) % self.of == self.number - 1}
        for case in known:
            load, number = loads[0]
            heapq.heapreplace(loads, (load + durations[case], number))
            if number == self.number:
                mine.add(case)
        return frozenset(mine)


def _hash(case: str) -> int:
    """Python's own hash differs from process to process."""
    return int.from_bytes(hashlib.sha256(case.encode()).digest()[:8])


@cache
def measured() -> Mapping[str, int]:
    found: dict[str, int] = json.loads(DURATIONS.read_text(encoding="utf-8"))
    return found
