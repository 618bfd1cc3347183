"""Plants faults in single lines of the reference with cosmic-ray, and says which of them the suites do not notice.

    python tools/mutation_suites.py --sample 300 --seed 1 --jobs 2 --out results/mutation

As tools/mutation.py, with the suites alone as judge: a mutant is killed by a check that is red on the reference. Only
the checks that run the mutated statement are tried, and for one outside of functions all that run a line of its file.
Left out are functions that no check of this tier calls, of the reference's own tools or twins of kernels alone, what
untold.py says of annotations and of the words of errors, and what is no Python. Writes OUT/mutants.jsonl, and
OUT/traced.json, which --traced takes for another seed of the same tree; prints the share killed and every survivor's
difference. Needs `pip install cosmic-ray` beside the project's own requirements.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import click
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, WorkItem
from mutation import installed_copy, order
from untold import compares_alike, in_annotation, in_words

JUDGE = Path(__file__).parent / "suites_judge.py"
EVERYWHERE = (0, sys.maxsize)


@click.command()
@click.option("--sample", default=300, help="how many mutants")
@click.option("--seed", default=1, help="of the sample")
@click.option("--jobs", default=2, help="mutants at a time")
@click.option("--tier", default="core", help="of the checks; those of lower tiers come first")
@click.option("--out", default="results/mutation", type=click.Path(path_type=Path), help="folder to make")
@click.option("--traced", "known", type=click.Path(path_type=Path), help="traced.json of a run on the same tree")
def main(sample: int, seed: int, jobs: int, tier: str, out: Path, known: Path | None) -> None:
    """Mutate all of reference_impl."""
    out = out.resolve()
    if out.exists():
        raise click.UsageError(f"--out: {out} exists, want a folder to make; name another or remove it")
    copies = [installed_copy(out / f"copy{number}") for number in range(jobs)]
    text = known.read_text() if known else judge(copies[0], tier, "trace").communicate()[0]
    (out / "traced.json").write_text(text)
    traced = json.loads(text)
    folder = copies[0] / "library" / "moe_conformance" / "reference_impl"
    with use_db(str(out / "all.sqlite")) as database:
        init(sorted(folder.rglob("*.py")), database, {})
        untold = (in_annotation, in_words, compares_alike)
        all_items = [item for item in database.work_items if not any(is_so(item) for is_so in untold)]
    items = [item for item in all_items if is_called(traced, folder, item)]
    drawn = random.Random(seed).sample(sorted(items, key=order), len(items))
    chosen = list(islice((item for item in drawn if is_python(mutated(item))), sample))
    left = len(all_items) - len(items)
    click.echo(f"{len(chosen)} of {len(items)} mutants of reference_impl; {left} in functions that no check calls")
    with ThreadPoolExecutor(jobs) as pool, (out / "mutants.jsonl").open("w") as file:
        runs = [pool.submit(run, chosen[n::jobs], folder, copy, tier, traced, file) for n, copy in enumerate(copies)]
        found = [entry for done in runs for entry in done.result()]
    survivors = [entry for entry in found if not entry["killed"]]
    for entry in survivors:
        click.echo(f"\n{entry['operator']}\n{entry['diff']}")
    click.echo(f"\nkilled {len(found) - len(survivors)} of {len(found)}, {1 - len(survivors) / len(found):.1%}")


def judge(copy: Path, tier: str, what: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(copy / "library"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", str(JUDGE), str(copy / "library"), tier, what]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run(
    items: list[WorkItem], folder: Path, copy: Path, tier: str, traced: dict[str, Any], file: Any
) -> list[dict[str, str]]:
    """These mutants, one after another, on this copy. folder: where the items' files lie."""
    process, found = judge(copy, tier, "judge"), []
    assert process.stdin is not None and process.stdout is not None
    for item in items:
        (mutation,) = item.mutations
        place = mutation.module_path.relative_to(folder)
        before, text = source(mutation.module_path), mutated(item)
        path = copy / "library" / "moe_conformance" / "reference_impl" / place
        checks = judging(traced, folder, item)
        process.stdin.write(json.dumps({"path": str(path), "text": text, "checks": checks}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        difference = difflib.unified_diff(before.splitlines(), text.splitlines(), str(place), lineterm="", n=2)
        entry = {
            "file": str(place),
            "line": str(mutation.start_pos[0]),
            "operator": mutation.operator_name,
            "killed": answer["killed"],
            "checks": str(len(checks)),
            "diff": "\n".join(difference),
        }
        found.append(entry)
        file.write(json.dumps(entry) + "\n")
        file.flush()
    process.stdin.close()
    process.wait()
    return found


def mutated(item: WorkItem) -> str:
    """The file's text with the fault."""
    (mutation,) = item.mutations
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    text: str = mutate_code(source(mutation.module_path), operator, mutation.occurrence)
    return text


def is_python(text: str) -> bool:
    """cosmic-ray takes the stars of {**a} for an operator."""
    try:
        compile(text, "mutated", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def is_called(traced: dict[str, Any], folder: Path, item: WorkItem) -> bool:
    """Whether a check runs a line of the innermost function around it, or of its file where there is none."""
    (mutation,) = item.mutations
    start, end = around(functions, mutation)
    # Whoever makes a function runs its first line.
    return bool(_running(traced, folder, mutation.module_path, (bodies(mutation.module_path).get(start, start), end)))


def judging(traced: dict[str, Any], folder: Path, item: WorkItem) -> list[int]:
    """The checks that may notice this mutant, those of the lower tiers and the short ones first."""
    (mutation,) = item.mutations
    inside = around(functions, mutation)
    # What a module does once is not run again for each check; a lambda in it is.
    span = around(statements, mutation) if inside != EVERYWHERE else inside
    checks = _running(traced, folder, mutation.module_path, span)
    return sorted(checks, key=lambda number: (traced["tiers"][number], traced["seconds"][number]))


def _running(traced: dict[str, Any], folder: Path, file: Path, span: tuple[int, int]) -> set[int]:
    lines = traced["ran"].get(str(file.relative_to(folder)), {})
    return {number for line, numbers in lines.items() if span[0] <= int(line) <= span[1] for number in numbers}


def around(spans: Callable[[Path], list[tuple[int, int]]], mutation: MutationSpec) -> tuple[int, int]:
    """The innermost of a file's spans of lines around a mutation, else all of them."""
    line = mutation.start_pos[0]
    found = [span for span in spans(mutation.module_path) if span[0] <= line <= span[1]]
    return min(found, key=lambda span: span[1] - span[0], default=EVERYWHERE)


@cache
def source(file: Path) -> str:
    """As it was before anything was mutated: `main` asks for every file before it starts."""
    return file.read_text()


@cache
def statements(file: Path) -> list[tuple[int, int]]:
    """First and last line of each statement; of one with a body, up to the body, and all of a function."""
    found = []
    for node in ast.walk(ast.parse(source(file))):
        body = [] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            found.append((node.lineno, max(node.lineno, last)))
        elif isinstance(node, ast.match_case):
            found.append((node.pattern.lineno, max(node.pattern.lineno, body[0].lineno - 1)))
    return found


@cache
def functions(file: Path) -> list[tuple[int, int]]:
    """First and last line of each function, with its decorators."""
    return [(_first(node), node.end_lineno or node.lineno) for node in _functions(file)]


@cache
def bodies(file: Path) -> dict[int, int]:
    """First line of each function -> first line of its body."""
    return {_first(node): node.body[0].lineno for node in _functions(file)}


def _functions(file: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source(file))) if isinstance(node, ast.FunctionDef)]


def _first(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(part.lineno for part in node.decorator_list)])


if __name__ == "__main__":
    main()
