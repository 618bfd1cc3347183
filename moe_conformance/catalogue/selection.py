"""Which cases `cases` and `explain` are about: of a class, a stage, a family, or of what an engine offers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.model.families.families import RECORDS
from moe_conformance.protocol.stages import STAGES


def selected(
    classes: Collection[str], stages: Collection[str], families: Collection[str], offered: Collection[str] | None = None
) -> list[Case]:
    """In suite order; an empty collection leaves nothing out. offered: the stages of an engine.

    Raises UsageError with the near name where one does not exist.
    """
    classes = aliases.current("class", classes, BUG_CLASSES, aliases.CLASSES)
    stages = aliases.current("stage", stages, STAGES)
    slugs = {record.slug: record.slug for record in RECORDS.values()}
    types = {record.model_type: record.slug for record in RECORDS.values()}
    wanted = {(slugs | types)[name] for name in aliases.current("family", families, sorted({*slugs, *types}))}
    return [
        case
        for case in catalogue().values()
        if (not classes or case.bug_class in classes)
        and (not stages or case.stage in stages)
        and (offered is None or case.stage in offered)
        and (not wanted or wanted & families_of(case))
    ]


def families_of(case: Case) -> set[str]:
    """Slugs of the families whose config, names or layers the case has; none where it is of no family."""
    found = {record.slug for name in _model_types(case.recipe) if (record := RECORDS.record_of(name))}
    if slug := _by_class().get(str(case.recipe.get("class"))):
        found.add(slug)
    # The stages that read checkpoints began with one family's styles of naming.
    return found | ({"gemma4"} if "style" in case.recipe else set())


def _model_types(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Of the recipe, and of the configs in it at any depth."""
    for key, value in recipe.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _model_types(value)


@cache
def _by_class() -> Mapping[str, str]:
    """Config class of transformers -> slug."""
    found = {}
    for record in RECORDS.values():
        for name in (record.config_class, record.wrapper.config_class if record.wrapper else ""):
            if name:
                found[name] = record.slug
    return found
