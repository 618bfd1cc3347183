"""Plants faults in single lines of the reference with cosmic-ray, and says which of them the suites do not notice.

    python tools/mutation_suites.py --sample 300 --seed 1 --jobs 2 --out results/mutation

As tools/mutation.py, with the suites alone as judge: a mutant is killed by a check that is red on the reference. Only
the checks that call the mutated function are run, and for a line outside of functions all that call one of its file.
Functions that no check calls are left out: of the reference's own tools, or twins of kernels alone. Writes
OUT/mutants.jsonl, and prints the share killed and every survivor's difference.
Needs `pip install cosmic-ray` beside the project's own requirements.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import click
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import WorkItem
from mutation import in_annotation, installed_copy, order

JUDGE = Path(__file__).parent / "suites_judge.py"


@click.command()
@click.option("--sample", default=300, help="how many mutants")
@click.option("--seed", default=1, help="of the sample")
@click.option("--jobs", default=2, help="mutants at a time")
@click.option("--tier", default="core", help="of the checks; those of lower tiers come first")
@click.option("--out", default="results/mutation", type=click.Path(path_type=Path), help="folder to make")
def main(sample: int, seed: int, jobs: int, tier: str, out: Path) -> None:
    """Mutate all of reference_impl."""
    out = out.resolve()
    if out.exists():
        raise click.UsageError(f"--out: {out} exists, want a folder to make; name another or remove it")
    copies = [installed_copy(out / f"copy{number}") for number in range(jobs)]
    traced = json.loads(judge(copies[0], tier, "trace").communicate()[0])
    folder = copies[0] / "library" / "moe_conformance" / "reference_impl"
    with use_db(str(out / "all.sqlite")) as database:
        init(sorted(folder.rglob("*.py")), database, {})
        all_items = [item for item in database.work_items if not in_annotation(item)]
    items = [item for item in all_items if judging(traced, folder, item)]
    chosen = random.Random(seed).sample(sorted(items, key=order), min(sample, len(items)))
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
        before = source(mutation.module_path)
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        text = mutate_code(before, operator, mutation.occurrence)
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


def judging(traced: dict[str, Any], folder: Path, item: WorkItem) -> list[int]:
    """The checks that may notice this mutant, those of the lower tiers and the short ones first."""
    (mutation,) = item.mutations
    place, line = str(mutation.module_path.relative_to(folder)), mutation.start_pos[0]
    called = {int(first): numbers for first, numbers in traced["called"].get(place, {}).items()}
    around = [span for span in functions(mutation.module_path) if span[0] <= line <= span[1]]
    start, end = max(around) if around else (0, sys.maxsize)
    checks = {number for first, numbers in called.items() if start <= first <= end for number in numbers}
    return sorted(checks, key=lambda number: (traced["tiers"][number], traced["seconds"][number]))


@cache
def source(file: Path) -> str:
    """As it was before anything was mutated: `main` asks for every file before it starts."""
    return file.read_text()


@cache
def functions(file: Path) -> list[tuple[int, int]]:
    """First and last line of each function, with its decorators."""
    return [
        (min([node.lineno, *(part.lineno for part in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(source(file)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


if __name__ == "__main__":
    main()
