"""Plants faults in single lines of reference or oracle with cosmic-ray, and says which of them no test notices.

    python tools/mutation.py reference --sample 300 --seed 1 --jobs 2 --out results/mutation

Works on installed copies of the tree, one for each job. Mutants of annotations are left out: nothing executes them.
Writes
OUT/mutants.jsonl, one line a mutant, and prints the share killed and every survivor's difference.
Needs `pip install cosmic-ray` beside the project's own requirements.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import click
from cosmic_ray.commands import init
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem
from untold import in_annotation

ROOT = Path(__file__).parent.parent
# Names that stand for files, and the tests that may kill mutants there.
ROOMS = {
    "reference": (
        tuple(f"reference_impl/{name}.py" for name in ("routing", "router", "capacity", "experts", "layer", "block")),
        ("tests/test_routing.py", "tests/test_experts.py", "tests/test_layer.py"),
    ),
    "oracle": (
        tuple(sorted(str(file.relative_to(ROOT)) for file in (ROOT / "moe_conformance" / "oracle").glob("[a-z]*.py"))),
        tuple(sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_oracle_*.py"))),
    ),
}
# A mutant that loops for ever is killed by the clock; the tests take a tenth of this.
SECONDS = 120.0


@click.command()
@click.option("--sample", default=300, help="how many mutants")
@click.option("--seed", default=1, help="of the sample")
@click.option("--jobs", default=2, help="mutants at a time")
@click.option("--out", default="results/mutation", type=click.Path(path_type=Path), help="folder to make")
@click.option("--test", "tests", multiple=True, help="test file that may kill, where FILES are named")
@click.argument("files", nargs=-1, required=True)
def main(sample: int, seed: int, jobs: int, out: Path, tests: tuple[str, ...], files: tuple[str, ...]) -> None:
    """Mutate FILES; "reference" is its routing, experts and layer, "oracle" all of it, each with its own tests."""
    if len(files) == 1 and files[0] in ROOMS:
        files, own = ROOMS[files[0]]
        tests = tests or own
    if not tests:
        raise click.UsageError(f"--test: got none, want the tests that may kill; or name one of {', '.join(ROOMS)}")
    out, modules = out.resolve(), list(files)
    if out.exists():
        raise click.UsageError(f"--out: {out} exists, want a folder to make; name another or remove it")
    if absent := [module for module in modules if not (ROOT / module).is_file()]:
        raise click.UsageError(f"FILES: got {', '.join(absent)}, want files of this tree, or one of {', '.join(ROOMS)}")
    copies = [installed_copy(out / f"copy{number}") for number in range(jobs)]
    for copy in copies:
        tried = subprocess.run(shlex.split(test_command(copy, tests)), cwd=copy / "source", stdout=subprocess.DEVNULL)
        if tried.returncode:
            raise click.ClickException("the tests fail before anything is mutated")
    installed = [Path("moe_conformance") / module.removeprefix("moe_conformance/") for module in modules]
    places = [copies[0] / "library" / module for module in installed]
    with use_db(str(out / "all.sqlite")) as database:
        init(places, database, {})
        items = [item for item in database.work_items if not in_annotation(item)]
    chosen = random.Random(seed).sample(sorted(items, key=order), min(sample, len(items)))
    click.echo(f"{len(chosen)} of {len(items)} mutants of {', '.join(modules)}")
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda pair: run(pair[1], chosen[pair[0] :: jobs], copies[0], tests), enumerate(copies))
        found = [entry for entries in runs for entry in entries]
    (out / "mutants.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in found))
    survivors = [entry for entry in found if entry["outcome"] == TestOutcome.SURVIVED]
    for entry in survivors:
        click.echo(f"\n{entry['operator']}\n{entry['diff']}")
    click.echo(f"\nkilled {len(found) - len(survivors)} of {len(found)}, {1 - len(survivors) / len(found):.1%}")


def installed_copy(folder: Path) -> Path:
    """The tracked and new files of the tree under source/, the package installed from them under library/."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "library"]
    subprocess.run([*pip, folder / "source"], check=True)
    return folder


def test_command(copy: Path, tests: tuple[str, ...]) -> str:
    return (
        f"env PYTHONPATH={copy / 'library'} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 "
        f"{sys.executable} -P -m pytest -x -q -p no:cacheprovider -n 0 {' '.join(tests)}"
    )


def order(item: WorkItem) -> tuple[str, ...]:
    (mutation,) = item.mutations
    return (
        mutation.module_path.name,
        mutation.operator_name,
        f"{mutation.occurrence:6}",
        json.dumps(mutation.operator_args, sort_keys=True),
    )


def run(copy: Path, items: list[WorkItem], first: Path, tests: tuple[str, ...]) -> list[dict[str, str]]:
    """One cosmic-ray session of these mutants on this copy."""
    config = copy / "session.toml"
    config.write_text(
        "[cosmic-ray]\n"
        f'module-path = "{copy / "library" / "moe_conformance"}"\n'
        f"timeout = {SECONDS}\n"
        "excluded-modules = []\n"
        f'test-command = "{test_command(copy, tests)}"\n'
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    here = [_moved(item, first, copy) for item in items]
    session = copy / "session.sqlite"
    with use_db(str(session), WorkDB.Mode.create) as database:
        database.add_work_items(here)
    executable = Path(sys.executable).parent / "cosmic-ray"
    subprocess.run([executable, "exec", config, session], cwd=copy / "source", check=True)
    with use_db(str(session), WorkDB.Mode.open) as database:
        results = dict(database.results)
    return [
        {
            "file": item.mutations[0].module_path.name,
            "line": str(item.mutations[0].start_pos[0]),
            "operator": item.mutations[0].operator_name,
            "outcome": str(results[item.job_id].test_outcome.value),
            "diff": results[item.job_id].diff or "",
        }
        for item in here
    ]


def _moved(item: WorkItem, first: Path, copy: Path) -> WorkItem:
    (mutation,) = item.mutations
    place = copy / mutation.module_path.relative_to(first)
    return attrs.evolve(item, mutations=(attrs.evolve(mutation, module_path=place),))


if __name__ == "__main__":
    main()
