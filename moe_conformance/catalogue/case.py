"""Cases: frozen data that says what is tried, why, and how much it costs. No torch here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.clauses import BUG_CLASSES, CLAUSES, Clause, Level
from moe_conformance.protocol.features import is_known, near, needs, unknown
from moe_conformance.protocol.stages import STAGES

# smoke: seconds. core: the default. full: sweeps. gpu: needs one.
TIERS = ("smoke", "core", "full", "gpu")

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Case:
    """One thing tried on an engine.

    id: kebab-case, never changes, independent of file, order and engine.
    stage: the engine method under test. clause: key into CLAUSES, which gives the bug class.
    recipe: plain data and specs that the check turns into inputs; the features that an engine must declare for it are
    computed from it (protocol/features.py). lenient: why this case breaks no more than a SHOULD, where its clause is a
    MUST, such as values that no published config has.
    """

    id: str
    stage: str
    clause: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tier: str = "core"
    lenient: str = ""

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.id):
            raise ValueError(f"case id: got {self.id!r}, want a kebab-case slug")
        if self.stage not in STAGES:
            raise ValueError(
                f"{self.id}: stage: got {self.stage!r}, want one of {', '.join(STAGES)}{near(self.stage, STAGES)}"
            )
        if self.clause not in CLAUSES:
            now = aliases.CLAUSES.get(self.clause)
            want = f"{now}, its new name" if now else f"one of {', '.join(CLAUSES)}{near(self.clause, CLAUSES)}"
            raise ValueError(f"{self.id}: clause: got {self.clause!r}, want {want}")
        if self.tier not in TIERS:
            raise ValueError(
                f"{self.id}: tier: got {self.tier!r}, want one of {', '.join(TIERS)}{near(self.tier, TIERS)}"
            )
        object.__setattr__(self, "recipe", MappingProxyType(dict(self.recipe)))
        if strangers := sorted(word for word in self.needs if not is_known(self.stage, word)):
            raise ValueError(f"{self.id}: {unknown(self.stage, strangers[0])}")

    @cached_property
    def needs(self) -> frozenset[str]:
        """The features of the stage that this case takes."""
        return needs(self.stage, self.clause, self.recipe)

    @property
    def level(self) -> Level:
        """What breaking it means: MUST as the clause says, or SHOULD."""
        return "SHOULD" if self.lenient else self.contract.level

    @property
    def bug_class(self) -> str:
        return CLAUSES[self.clause].bug_class

    @property
    def contract(self) -> Clause:
        return CLAUSES[self.clause]

    def __getitem__(self, key: str) -> Any:
        return self.recipe[key]


def check(cases: Iterable[Case]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark `test_NAME(engine, case)` as the check NAME of these cases.

    The function runs in the engine's process. It raises `Nonconformance`, or returns discrete facts
    (JSON data) that are compared with the golden snapshot of (bug class, check, case), or returns None.
    """
    listed = tuple(cases)

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.moe_cases = listed  # type: ignore[attr-defined]
        return function

    return mark


@cache
def catalogue() -> Mapping[str, Case]:
    """Every case of every suite, by id, in suite order. Raises ValueError where an alias leads nowhere."""
    suites = importlib.import_module("moe_conformance.suites")
    found: dict[str, Case] = {}
    for folder in sorted(pkgutil.iter_modules(suites.__path__), key=lambda m: m.name):
        if not folder.ispkg:
            continue
        module = importlib.import_module(f"moe_conformance.suites.{folder.name}.cases")
        for case in module.CASES:
            if found.setdefault(case.id, case) is not case:
                raise ValueError(f"case id: got {case.id!r} twice, want each case to have its own")
    if astray := list(aliases.astray(found, BUG_CLASSES, CLAUSES, check_names(), STAGES, is_known)):
        raise ValueError("\n".join(astray))
    return MappingProxyType(found)


@cache
def checks() -> Mapping[str, Mapping[str, str]]:
    """Case id -> check name -> docstring, over every suite. Imports the test modules, and torch with them."""
    suites = importlib.import_module("moe_conformance.suites")
    found: dict[str, dict[str, str]] = {case_id: {} for case_id in catalogue()}
    for module_info in pkgutil.walk_packages(suites.__path__, "moe_conformance.suites."):
        if not module_info.name.rpartition(".")[2].startswith("test_"):
            continue
        for name, function in vars(importlib.import_module(module_info.name)).items():
            for case in getattr(function, "moe_cases", ()):
                if case.id not in found:
                    raise ValueError(
                        f"{case.id}: marked on {name} of {module_info.name}; add it to its stage's CASES, too"
                    )
                found[case.id][name.removeprefix("test_")] = inspect.cleandoc(function.__doc__ or "")
    return found


@cache
def check_names() -> frozenset[str]:
    """The names of all checks, read from the test modules' text: importing them would take torch."""
    suites = importlib.import_module("moe_conformance.suites")
    files = [file for folder in suites.__path__ for file in Path(folder).glob("*/test_*.py")]
    found = [re.findall(r"^def test_(\w+)\(engine", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return frozenset(name for names in found for name in names)


def in_tier(case: Case, tier: str) -> bool:
    """Whether a run of `tier` includes the case: each tier includes those before it, gpu all but full."""
    if tier == "gpu":
        return case.tier != "full"
    return case.tier != "gpu" and TIERS.index(case.tier) <= TIERS.index(tier)
