"""A mutant: a correct engine with one planted fault, and the case that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_conformance.engine import Engine


@dataclass(frozen=True)
class Mutant:
    """engine: the faulty class. fault: one line on what is wrong. killed_by: (case id, check) that must fail."""

    engine: type[Engine]
    bug_class: str
    fault: str
    killed_by: tuple[str, str]
