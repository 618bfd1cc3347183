"""A mutant: the reference with one planted fault, and the case that must notice it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_conformance.engines.reference import Reference


class Faulty(Reference):
    """The reference under another name, made of the class's: PrefixTwice is reported as prefix-twice."""

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


@dataclass(frozen=True)
class Mutant:
    """engine: the faulty class. fault: one line on what is wrong. killed_by: (case id, check) that must fail.

    also: further classes whose cases cannot do without what is faulty, such as sums of outputs that are wrong.
    slow: the case waits for seconds before it fails.
    """

    engine: type[Faulty]
    bug_class: str
    fault: str
    killed_by: tuple[str, str]
    also: frozenset[str] = frozenset()
    slow: bool = False
