"""The words around a verdict: what the clause says, whom its breach has cost, how to rerun."""

from __future__ import annotations

import textwrap

from moe_conformance.catalogue.case import Case


def rerun(engine: str, case: Case) -> str:
    return f"moe-conformance run --engine {engine} --case {case.id}"


def about(case: Case) -> str:
    """Stage, clause and upstream bugs of a case."""
    lines = [f"stage:    {case.stage}", f"class:    {case.bug_class}", f"clause:   {case.contract.text}"]
    if case.contract.upstream:
        lines.append(f"upstream: {', '.join(case.contract.upstream)}")
    return "\n".join(lines)


def failure(engine: str, case: Case, check: str, message: str) -> str:
    """The message of a bad verdict."""
    return f"{check.replace('_', ' ')}\n{message}\n{about(case)}\nrerun:    {rerun(engine, case)}"


def explain(case: Case, checks: dict[str, str]) -> str:
    """A case without running it; `checks` maps the names of its checks to their docstrings."""
    recipe = "\n".join(f"  {key} = {value!r}" for key, value in case.recipe.items()) or "  (none)"
    asked = "\n".join(
        f"  {name.replace('_', ' ')}" + (f"\n{textwrap.indent(doc, '      ')}" if doc else "")
        for name, doc in checks.items()
    )
    needs = ", ".join(sorted(case.needs)) or "nothing beyond the stage"
    return (
        f"{case.id} (tier {case.tier})\n{about(case)}\nneeds:    {needs}\n"
        f"inputs:\n{recipe}\nchecks:\n{asked}\nrerun:    {rerun('ENGINE', case)}"
    )
