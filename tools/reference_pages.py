"""The pages of the documentation that are made from the code: contract.md and commands.md.

    python tools/reference_pages.py FOLDER

docs/conf.py writes them into docs/ whenever the site is built; git ignores them there, so they cannot be out of date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import moe_conformance.engines.mutants
from moe_conformance import cli
from moe_conformance.catalogue.case import catalogue
from moe_conformance.catalogue.clauses import BUG_CLASSES, CLAUSES
from moe_conformance.reporting.threads import address

CONTRACT = """# The contract

What an engine must do, clause by clause, as `moe_conformance/catalogue/clauses.py` has it. A broken MUST is a wrong
result, a crash or a model that does not load; a broken SHOULD is lenience, a verdict of its own, which fails a run only
with `--strict`.

Cases are counted over all tiers; a case may lower the level of its clause. Mutants are engines with one planted fault
each, counted at the clause of the case that must notice them.
"""

COMMANDS = """# Commands

What each command prints for `--help`.
"""

# Columns of the help texts.
WIDTH = 110


def contract() -> str:
    """A table for each bug class."""
    cases = Counter(case.clause for case in catalogue().values())
    stages: dict[str, set[str]] = {}
    for case in catalogue().values():
        stages.setdefault(case.clause, set()).add(case.stage)
    mutants = Counter(catalogue()[case].clause for case in _cases_of_mutants())
    lines = [CONTRACT, f"{len(CLAUSES)} clauses, {cases.total():,} cases, {mutants.total()} mutants.", ""]
    for bug_class in BUG_CLASSES:
        own = {name: clause for name, clause in CLAUSES.items() if clause.bug_class == bug_class}
        lines += [f"## {bug_class}", "", "| clause | cases | mutants |", "|---|---|---|"]
        for name, clause in own.items():
            threads = ", ".join(_link(thread) for thread in clause.upstream)
            said = f"**{clause.level}** `{name}`: {clause.text}" + (f" Broken in {threads}." if threads else "")
            asked = ", ".join(f"`{stage}`" for stage in sorted(stages.get(name, ())))
            lines.append(f"| {said} Stages: {asked}. | {cases[name]} | {mutants[name]} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """The help text of the whole and of each command, under its name."""
    with patch.dict(os.environ, COLUMNS=str(WIDTH)):  # where argparse looks
        parser = cli._parser()
        (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        listed = {"moe-conformance": parser} | {made.prog: made for made in choices.values()}  # an alias is no other
        parts = [f"## {name}\n\n```text\n{made.format_help().rstrip()}\n```\n" for name, made in listed.items()]
    return "\n".join([COMMANDS, *parts])


def write(folder: Path) -> None:
    """Both pages, in the folder; a file that is as it should be is left, so that a build has nothing to do."""
    for name, text in (("contract.md", contract()), ("commands.md", commands())):
        file = folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def _cases_of_mutants() -> Iterator[str]:
    package = moe_conformance.engines.mutants
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for mutant in getattr(importlib.import_module(found.name), "MUTANTS", ()):
            yield mutant.killed_by[0]


def _link(thread: str) -> str:
    return f"[{thread}]({address(thread)})" if address(thread) else thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
