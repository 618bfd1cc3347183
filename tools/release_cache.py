"""The cache of releases that are judged: the sources of wheels from a package index, and environments.

Which environment a release is judged in, its server says (release_servers.py). All environments share one torch and one
triton; other large files that two of them have alike are one file on disk. What was used longest ago is removed where
the cache would outgrow its limit.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import ClassVar

import click
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
# The wheels pin a torch that PyPI does not have, or of CUDA; this project's pins take the place of theirs.
SHARED = ("torch", "triton")
# What this project's wheel needs. Of transformers, too, its own pin: those that releases ask for import torchvision
# with every multimodal model, and PyPI's does not load beside a torch without CUDA.
HARNESS = ("packaging", "pytest", "pytest-xdist", "syrupy", "transformers")
MOST_GIGABYTES = 9.0
# Bytes that an environment takes on disk before it shares files, and torch with triton.
ROOM, TORCH_ROOM = 2e9, 2e9
# Files from this size on are shared by environments. Python files are not: a link would outdate their bytecode.
LARGE = 64 * 1024


@dataclass(frozen=True)
class Place:
    """What judges a release: an interpreter, and the folder of sources that comes before what it has installed.

    has: what of the release is judged there, in words.
    """

    python: Path
    overlay: Path | None
    has: str
    environment: Mapping[str, str] = field(default_factory=dict)


class Cache(abc.ABC):
    """The folder of environments and sources. An unfinished entry has no marker and is made again.

    most: bytes that it may take.
    """

    # Names on the package index; a version is taken from the first that has it.
    packages: ClassVar[tuple[str, ...]]
    # The first that the adapter is meant for, and how many of its numbers make a line of releases.
    oldest: ClassVar[str]
    line: ClassVar[int]
    engines: ClassVar[tuple[str, ...]]
    # Before the version in the name of its folder.
    prefix: ClassVar[str] = ""
    # The release that is its environment's, whose sources are not kept apart; "": there is none.
    base: ClassVar[str] = ""

    def __init__(self, folder: Path, most: float = MOST_GIGABYTES * 1e9) -> None:
        self.folder = folder
        self.most = most
        self.used: set[Path] = set()
        require_writable(folder, "--cache")

    @abc.abstractmethod
    def place(self, version: str) -> Place:
        """Where the release is; fetches and builds what is missing."""

    @abc.abstractmethod
    def environment_of(self, version: str) -> Path:
        """The folder of the environment that the release is judged in, whether or not it is there."""

    @abc.abstractmethod
    def wants(self, name: str) -> bool:
        """Whether a file of the wheel is among the sources that are kept."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time in a cache; another says that it waits."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                click.echo(f"cache: another run uses {self.folder}; waiting for its end")
                fcntl.flock(file, fcntl.LOCK_EX)
            # By a pip, too, that outlives a run which was killed: it still writes to an environment.
            os.set_inheritable(file.fileno(), True)
            yield

    def released(self) -> list[str]:
        """Of every line of releases from the oldest on the last one. Raises ClickException without an index."""
        last: dict[tuple[int, ...], Version] = {}
        for version in map(Version, self.versions()):
            if version >= Version(self.oldest) and not version.is_prerelease:
                key = version.release[: self.line]
                last[key] = max(version, last.get(key, version))
        return [str(version) for version in sorted(last.values())]

    def versions(self, packages: Iterable[str] = ()) -> list[str]:
        """What the index has of these packages, or of all, oldest first."""
        found = {version for name in packages or self.packages for version in _listed(name)}
        if not found:
            # A package index that cannot be reached looks to pip like one without the package.
            raise click.ClickException(f"{self.packages[0]}: no package index answers; is there a network?")
        return sorted(found, key=Version)

    def metadata(self, version: str) -> Message:
        return BytesParser().parsebytes((self.sources(version) / "METADATA").read_bytes())

    def has_sources(self, version: str) -> bool:
        return (self._sources(version) / "METADATA").exists()

    def sources(self, version: str) -> Path:
        """The files of the release that are judged, and its metadata beside them."""
        folder = self._use(self._sources(version))
        if not self.has_sources(version):
            click.echo(f"{version}: fetching its sources")
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                unpacked = Path(scratch) / "unpacked"
                with zipfile.ZipFile(self.wheel(version, Path(scratch))) as wheel:
                    names = wheel.namelist()
                    wheel.extractall(unpacked, filter(self.wants, names))
                    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
                    (unpacked / "METADATA").write_bytes(wheel.read(metadata))
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
        return folder

    def _sources(self, version: str) -> Path:
        return self.folder / "releases" / f"{self.prefix}{version}"

    def wheel(self, version: str, folder: Path) -> Path:
        """Download a release's wheel. Raises ClickException naming the releases there are, or what keeps us off."""
        for package in self.packages:
            command = ("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, f"{package}=={version}")
            try:
                _pip(Path(sys.executable), *command, what=f"{package} {version}")
            except click.ClickException as error:
                if "No matching distribution" not in error.message:
                    raise
            else:
                return next(folder.glob("*.whl"))
        raise click.ClickException(
            f"{self.packages[0]}: got version {version}, want one of {', '.join(reversed(self.versions()))}"
        )

    def environment(self, folder: Path, title: str, install: Callable[[Path], None]) -> Path:
        """The python of an environment: install puts in it, given that, what it holds beside torch and triton."""
        python = folder / "bin" / "python"
        self.used |= {folder, self._shared_folder()}
        if not self._is_complete(folder):
            self._make_room()
            shared = self._shared()
            click.echo(f"{title}: building an environment in {folder}, which takes minutes")
            _fresh(folder)
            site = site_packages(folder)
            (site / "shared.pth").write_text(f"{site_packages(shared)}\n")
            install(python)
            self._share_files(folder)
            write(folder / "complete", title + "\n")
        self._use(folder)
        self._use(self._shared_folder())
        return python

    def _is_complete(self, folder: Path) -> bool:
        return (folder / "complete").exists()

    def _shared_folder(self) -> Path:
        return self.named("torch", list(pins(SHARED)))

    def _shared(self) -> Path:
        """The environment whose torch and triton the others take."""
        folder = self._shared_folder()
        if not self._is_complete(folder):
            wanted = pins(SHARED)
            click.echo(f"installing {' and '.join(wanted)} in {folder}")
            _fresh(folder)
            install(folder / "bin" / "python", *wanted, what=" and ".join(wanted))
            write(folder / "complete", "\n".join(wanted) + "\n")
        return folder

    def named(self, kind: str, recipe: Sequence[str]) -> Path:
        """The folder of what is made by this recipe with this Python."""
        name = hashlib.sha256(repr([sys.version, *recipe]).encode()).hexdigest()[:12]
        return self.folder / f"{kind}-{name}"

    def environment_named(self, recipe: Sequence[str]) -> Path:
        return self.named("env", [*recipe, self._shared_folder().name])

    def _share_files(self, folder: Path) -> None:
        """Large files that another environment has alike become one file on disk."""
        others = [other for other in self.folder.glob("env-*") if other != folder and self._is_complete(other)]
        for file in _files(folder):
            if file.suffix in (".py", ".pyc") or file.is_symlink() or file.stat().st_size < LARGE:
                continue
            for other in others:
                twin = other / file.relative_to(folder)
                if twin.is_file() and not twin.is_symlink() and filecmp.cmp(file, twin, shallow=False):
                    link(twin, file)
                    break

    def _use(self, folder: Path) -> Path:
        """This run needs that entry, and it is now the one that was used last."""
        self.used.add(folder)
        if folder.exists():
            os.utime(folder)
        return folder

    def claim(self, versions: Iterable[str]) -> None:
        """Keep from being removed what is there of these releases."""
        for version in versions:
            if version == self.base or self.has_sources(version):
                self.used |= {self._sources(version), self.environment_of(version), self._shared_folder()}

    def _entries(self) -> list[Path]:
        """What this run does not use, the one that was used longest ago first."""
        found = [entry for kind in ("env-*", "torch-*", "releases/*") for entry in self.folder.glob(kind)]
        return sorted((entry for entry in found if entry not in self.used), key=lambda entry: entry.stat().st_mtime)

    def evict(self, room: float = 0) -> None:
        """Remove what was used longest ago, and not by this run, until so much more fits into the limit."""
        for entry in self._entries():
            size = self.size()
            if size + room <= self.most:
                return
            _remove(entry)
            click.echo(f"cache: {entry.name} removed, {(size - self.size()) / 1e9:.1f} GB: at most {self.most / 1e9:g}")

    def _make_room(self) -> None:
        """Raises ClickException if the disk has no space for another environment."""
        room = ROOM + (0 if self._is_complete(self._shared_folder()) else TORCH_ROOM)
        self.evict(room)
        if (free := shutil.disk_usage(self.folder).free) < room:
            raise click.ClickException(
                f"cache: {self.folder} has {free / 1e9:.1f} GB left, an environment wants {room / 1e9:.0f}; free some, "
                "or name another folder with --cache"
            )

    def prune(self) -> int:
        """Remove what this run did not use; the bytes that became free."""
        before = self.size()
        for entry in self._entries():
            _remove(entry)
        return before - self.size()

    def size(self) -> int:
        """Bytes on disk. A file with several names counts once."""
        stats = (file.lstat() for file in _files(self.folder))
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def require_writable(folder: Path, option: str) -> None:
    """Make the folder. Raises ClickException, before minutes go into what cannot be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.ClickException(
            f"{option}: cannot write to {folder}: {error.strerror}; name another folder with {option}"
        ) from error


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-conformance"


def _listed(package: str) -> list[str]:
    listed = subprocess.run([*_PIP, "index", "versions", package], capture_output=True, text=True).stdout
    there = re.search(r"Available versions: (.*)", listed)
    return there[1].split(", ") if there else []


def install_project(python: Path, target: Path | None = None, *beside: str) -> None:
    """Build this project's wheel from a copy, so that nothing is left in the checkout, and install it.

    target: a folder to install it in, in place of the interpreter's own. beside: requirements to install with it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "source"
        hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "results")
        shutil.copytree(ROOT, copy, ignore=hidden)
        _pip(Path(sys.executable), "wheel", "--no-deps", "--wheel-dir", scratch, copy, what="this project's wheel")
        wheel = next(Path(scratch).glob("*.whl"))
        where = ("--target", target, "--upgrade") if target else ()
        _pip(python, "install", "--no-deps", "--force-reinstall", *where, wheel, *beside, what="this project's wheel")


def write(file: Path, text: str) -> None:
    """Write the whole file or nothing."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def site_packages(folder: Path) -> Path:
    """Of an environment."""
    return next((folder / "lib").glob("python3*")) / "site-packages"


def link(file: Path, name: Path) -> None:
    """Give a file another name, in place of whatever has that now."""
    part = name.with_name(f"{name.name}.part")
    part.unlink(missing_ok=True)
    os.link(file, part)
    part.replace(name)


def install(python: Path, *requirements: str | Path, what: str) -> None:
    """Raises ClickException with pip's last words."""
    _pip(python, "install", *requirements, what=what)


def _files(folder: Path) -> Iterator[Path]:
    return (Path(root) / name for root, _, names in os.walk(folder) for name in names)


def _remove(entry: Path) -> None:
    # Without its marker first, so that what is left by an interruption is never used.
    for marker in ("complete", "METADATA"):
        (entry / marker).unlink(missing_ok=True)
    shutil.rmtree(entry)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder, what="venv")


def _pip(python: Path, verb: str, *arguments: str | Path, what: str) -> None:
    command = (python, "-m", "pip", "--disable-pip-version-check", verb, "--quiet", *arguments)
    try:
        _run(*command, what=f"pip {verb} of {what}")
    except click.ClickException as error:
        if "(from versions: none)" in error.message:  # of a package whose name is right
            error.message += "\n  no package index answers; is there a network?"
        raise


def _run(*command: str | Path, what: str) -> None:
    """Run quietly. Raises ClickException with the command's last words."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, close_fds=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-6:]
        raise click.ClickException(f"{what}: exit code {done.returncode}\n" + "\n".join(f"  {line}" for line in words))


def pins(names: Iterable[str]) -> tuple[str, ...]:
    """Their requirement lines in ci/constraints.txt."""
    lines = [line for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {Requirement(line).name: line for line in lines}
    return tuple(pinned[name] for name in names)


def asked(metadata: Message) -> list[Requirement]:
    """What a release needs on this machine, without extras."""
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
