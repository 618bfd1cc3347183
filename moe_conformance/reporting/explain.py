"""The text around a verdict: what the clause says, where its breach has cost somebody, how to rerun."""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import groupby
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.catalogue.recipe_words import meaning
from moe_conformance.protocol.features import Feature, feature, words
from moe_conformance.protocol.stages import STAGES

_WIDTH = 110


def rerun(engine: str, case: Case, seed: int = 0) -> str:
    """For a shell, whatever the engine was asked for as."""
    return f"moe-conformance run --engine {shlex.quote(engine)} --case {case.id}" + (f" --seed {seed}" if seed else "")


def about(case: Case) -> str:
    """Stage, level, clause and upstream bugs of a case."""
    level = f"{case.level}, for {case.lenient}" if case.lenient else case.level
    lines = [f"stage:    {case.stage}", f"class:    {case.bug_class}", f"level:    {level}"]
    lines.append(f"clause:   {case.contract.text}")
    if case.contract.upstream:
        lines.append(f"upstream: {', '.join(case.contract.upstream)}")
    if case.contract.origin:
        lines.append(f"origin:   {case.contract.origin}")
    return "\n".join(lines)


def failure(engine: str, case: Case, check: str, message: str, seed: int = 0) -> str:
    """The message of a bad verdict."""
    return f"{check.replace('_', ' ')}\n{message}\n{about(case)}\nrerun:    {rerun(engine, case, seed)}"


def explain(case: Case, checks: Mapping[str, str]) -> str:
    """A case without running it; `checks` maps the names of its checks to their docstrings."""
    recipe = "\n".join(_entry(case, key, value) for key, value in case.recipe.items()) or "  (none)"
    asked = "\n".join(
        f"  {name.replace('_', ' ')}" + (f"\n{textwrap.indent(doc, '      ')}" if doc else "")
        for name, doc in checks.items()
    )
    needs = "\n".join(f"  {word}: {feature(case.stage, word).meaning}" for word in sorted(case.needs))
    return (
        f"{case.id} (tier {case.tier})\n{about(case)}\nneeds:{'    nothing beyond the stage' if not needs else ''}\n"
        + (f"{needs}\n" if needs else "")
        + f"inputs:\n{recipe}\n{_specs(case)}checks:\n{asked}\nrerun:    {rerun('ENGINE', case)}"
    )


def _entry(case: Case, key: str, value: Any) -> str:
    """A word of the recipe, and what it means."""
    text = f"{key} = {spelled(value)}"
    filled = textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([filled, *(f"      {said}" for said in [meaning(case.stage, key)] if said)])


def _specs(case: Case) -> str:
    """What the fields of the specs in its recipe mean: the docstring of each, once."""
    kinds = dict.fromkeys(kind for value in case.recipe.values() for kind in _kinds(value))
    said = ["where"] * bool(kinds)
    for kind in kinds:
        first, *rest = inspect.cleandoc(kind.__doc__ or "").splitlines()
        said += [f"  {kind.__name__}: {first}", *(f"      {line}" for line in rest if line)]
    return "".join(f"{line}\n" for line in said)


def _kinds(value: Any) -> Iterator[type]:
    if is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for item in fields(value):
            yield from _kinds(getattr(value, item.name))
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from _kinds(inside)
    elif isinstance(value, tuple | list):
        for inside in value:
            yield from _kinds(inside)


def spelled(value: Any) -> str:
    """Like `repr`, but a spec shows only the fields that differ from their defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        named = [item for item in fields(value) if _default(item) != getattr(value, item.name)]
        inside = ", ".join(f"{item.name}={spelled(getattr(value, item.name))}" for item in named)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple) and type(value) is tuple:
        return "(" + ", ".join(map(spelled, value)) + (",)" if len(value) == 1 else ")")
    if isinstance(value, list):
        return "[" + ", ".join(map(spelled, value)) + "]"
    return repr(value)


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def features(stages: tuple[str, ...] = STAGES) -> str:
    """The table of optional features, by stage."""
    lines = []
    for stage in stages:
        there: Mapping[str, Feature] = words(stage)
        lines += [stage] + ["  (none)"] * (not there)
        for without, group in groupby(there.items(), key=lambda item: item[1].without):
            lines.append(f"  not judged without it: {without}")
            lines += [f"    {word:22} {entry.meaning}" for word, entry in group]
    return "\n".join(lines)
