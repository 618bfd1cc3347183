"""The command behind releases.py: which releases to judge, how, and what to report.

Environments and sources lie in a cache (release_cache.py): the first run takes minutes for each environment and some
seconds for each release, later ones what the judging takes.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from packaging.version import InvalidVersion, Version
from release_cache import MOST_GIGABYTES, Cache, Place, install_project, require_writable, user_cache, write
from release_report import fault_lines, stages
from release_servers import SERVERS, server_of

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.stream import read
from moe_conformance.reporting.tables import as_text

BROKEN = {Verdict.ERROR, Verdict.CRASH, Verdict.TIMEOUT, Verdict.UNAVAILABLE}
SECONDS_BETWEEN_WORDS = 15


@dataclass(frozen=True)
class Asked:
    """What is judged of each release, as `moe-conformance run` takes it."""

    engines: tuple[str, ...]
    options: tuple[str, ...]

    def of_case(self, case: str) -> Asked:
        return Asked(self.engines, ("--case", case))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("versions", nargs=-1)
@click.option("--out", default="results/releases", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Default: moe-conformance in the user's."
)
@click.option("--engine", "engines", multiple=True, help="Default: all of the server. Or package.module:Class.")
@click.option("--of", "server", type=click.Choice(list(SERVERS)), help="Whose releases; default: what --engine says.")
@click.option("--class", "bug_class", help="Only this bug class.")
@click.option("--case", help="Only this case.")
@click.option("-k", "keyword", help="As for pytest.")
@click.option("--tier", help="As for `moe-conformance run`.")
@click.option("--known", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Known failures, TOML.")
@click.option("--bisect", metavar="CASE", help="Find the release in which this case turned.")
@click.option("--prune", is_flag=True, help="Remove from the cache what this run did not use.")
@click.option(
    "--cache-limit",
    type=click.FloatRange(min=0),
    default=MOST_GIGABYTES,
    show_default=True,
    help="Gigabytes. What was used longest ago is removed where the cache would be larger.",
)
def main(
    versions: tuple[str, ...],
    out: Path,
    cache: Path | None,
    engines: tuple[str, ...],
    server: str | None,
    bug_class: str | None,
    case: str | None,
    keyword: str | None,
    tier: str | None,
    known: Path | None,
    bisect: str | None,
    prune: bool,
    cache_limit: float,
) -> None:
    """Judge each VERSION of vLLM, or the last of every minor release from 0.19 on; writes OUT/VERSION/.

    With --engine sglang it is SGLang, from 0.5.20 on.

    Exit code 0: every release was judged. 1: a process broke, or with --known a verdict was not as declared.
    """
    # As Ctrl-C does it: ends what this process has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for version in versions:
        try:
            Version(version)
        except InvalidVersion as error:
            raise click.BadParameter(f"got {version!r}, want a version such as 0.20.0", param_hint="VERSION") from error
    given = {"--class": bug_class, "--case": case, "-k": keyword, "--tier": tier, "--known": known and known.resolve()}
    whose = SERVERS[server or server_of(engines)]
    asked = Asked(engines or whose.engines, _words(given))
    kept = whose((cache or user_cache()).resolve(), cache_limit * 1e9)
    require_writable(out, "--out")
    with kept.locked():
        chosen = sorted(versions, key=Version) or kept.released()
        kept.claim(chosen)
        kept.evict()
        judge = _Judge(kept, out.resolve(), {})
        if bisect:
            _bisect(judge, asked.of_case(bisect), chosen)
        else:
            judge.all(asked, chosen)
            same = {
                "--of": server,
                "--cache": cache and cache.resolve(),
                "--cache-limit": f"{cache_limit:g}" if cache_limit != MOST_GIGABYTES else None,
                # A folder of its own, or what is reported here would be written over.
                "--out": out.resolve() / "again",
            }
            _report(judge, asked, _words(same))
        kept.evict()
        _places(kept, out.resolve(), prune)
    broken = any(result.verdict in BROKEN for results in judge.results.values() for result in results)
    sys.exit(int(broken or (bool(known) and judge.is_otherwise)))


@dataclass
class _Judge:
    cache: Cache
    out: Path
    results: dict[str, Sequence[Result]]
    is_otherwise: bool = False

    def all(self, asked: Asked, versions: Sequence[str]) -> None:
        for number, version in enumerate(versions, 1):
            self.one(asked, version, f"{version} ({number} of {len(versions)})")

    def one(self, asked: Asked, version: str, title: str) -> Sequence[Result]:
        place = self.cache.place(version)
        if place.python not in self._prepared:
            install_project(place.python)
            self._prepared.add(place.python)
        folder = self.out / version
        self.is_otherwise |= _run(place, asked, folder, title) != 0
        try:
            self.results[version] = found = read(folder)
        except UsageError as error:
            log = folder / "log.txt"
            last = "".join(
                f"\n  {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
            )
            raise click.ClickException(f"{version}: {error}; the end of {log}:{last}") from error
        verdicts = Counter(result.verdict for result in found)
        said = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in sorted(verdicts.items()))
        click.echo(f"{title}, {place.has}: {said or 'no results'}")
        return found

    def __post_init__(self) -> None:
        self._prepared: set[Path] = set()


def _words(options: Mapping[str, object]) -> tuple[str, ...]:
    """Those that have a value, as a command line takes them."""
    return tuple(str(word) for pair in options.items() if pair[1] is not None for word in pair)


def _engines(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("--engine", name)]


def _run(place: Place, asked: Asked, folder: Path, title: str) -> int:
    """Judge a release in its own process, and say from time to time how far it is."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = folder / "verdicts.jsonl"
    stream.unlink(missing_ok=True)
    command = [str(place.python), "-P", "-m", "moe_conformance", "run", *_engines(asked.engines), *asked.options]
    before = [str(place.overlay)] if place.overlay else []
    path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, **place.environment}
    with (folder / "log.txt").open("w") as log:
        running = subprocess.Popen(
            [*command, "--out", str(folder)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        said = time.monotonic()
        try:
            while running.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - said > SECONDS_BETWEEN_WORDS:
                    said = time.monotonic()
                    click.echo(f"{title}: {stages(_so_far(stream)) or 'starting'}")
        except BaseException:
            running.kill()
            raise
    return running.returncode


def _so_far(stream: Path) -> list[str]:
    """The stages of the results that are there; the last line may be half written."""
    lines = stream.read_text(encoding="utf-8").split("\n")[:-1] if stream.exists() else []
    return [said["stage"] for line in lines if (said := json.loads(line))["kind"] == "result"]


def _bisect(judge: _Judge, asked: Asked, versions: Sequence[str]) -> None:
    """Say between which two releases the case turned, judging as few as may be."""
    if len(versions) < 2:
        raise click.UsageError(f"--bisect: got {len(versions)} release, want two or more, or none for all")

    def verdict(version: str) -> str:
        found = judge.one(asked, version, version)
        worst = max(found, key=lambda result: (result.verdict.badness, not result.verdict.was_judged), default=None)
        return "absent" if worst is None else worst.verdict.replace("_", " ")

    low, high = 0, len(versions) - 1
    first, last = verdict(versions[low]), verdict(versions[high])
    if first == last:
        click.echo(f"{first} in {versions[low]} and in {versions[high]}: nothing to find between them")
        return
    while high - low > 1:
        middle = (low + high) // 2
        if (found := verdict(versions[middle])) == first:
            low = middle
        else:
            high, last = middle, found
    click.echo(f"{first} in {versions[low]}, {last} in {versions[high]}")


def _report(judge: _Judge, asked: Asked, same: Sequence[str]) -> None:
    """same: the options that a command which judges one case again needs, too."""
    text = "\n".join(as_text(judge.results)).lstrip("\n")
    # An engine given as module:Class is asked for by that, and has another name in its results.
    addressed = [engine for engine in asked.engines if ":" in engine]

    def again(version: str, result: Result) -> str:
        engines = _engines(addressed or [result.engine])
        return shlex.join(["tools/releases.py", version, *engines, "--case", result.case, *same])

    lines = list(fault_lines(judge.results, again))
    if lines:
        text += "\n\ndistinct faults:\n" + "\n".join(lines)
    write(judge.out / "releases.txt", text + "\n")
    click.echo(text)


def _places(cache: Cache, out: Path, prune: bool) -> None:
    freed = f", {cache.prune() / 1e9:.1f} GB freed" if prune else ""
    size, most = cache.size() / 1e9, cache.most / 1e9
    much = "; this run uses all of it" if size > most else ""
    results = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    where = f"{cache.folder} ({size:.1f} GB of at most {most:g}{freed}{much})"
    click.echo(f"results: {out} ({results:.1f} MB); cache: {where}")
