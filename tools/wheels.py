"""Collects wheels for a GPU machine without a network: this project's, and the dependencies missing there.

    python tools/wheels.py --out wheels                # ci/gpu.sh finds them there, or takes --wheels FOLDER
    python tools/wheels.py --also transformers==5.24.0 --also huggingface_hub==1.31.0

Downloads the dependencies of pyproject.toml in the versions of ci/constraints.txt, without those in HAS; a package in
HAS is downloaded only if --also names it. Prints the total size, and refuses more than 30 MiB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# Packages that such a machine has, with their own dependencies.
HAS = ("numpy", "safetensors", "torch", "transformers", "triton")
# Needed in addition to the package's own dependencies: benchmarks/ and tools/ import it.
OF_DEV = ("click",)
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LARGEST = 30 * 2**20


def needed() -> list[str]:
    """Requirements of the project that HAS does not meet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dev = [text for text in project["optional-dependencies"]["dev"] if Requirement(text).name in OF_DEV]
    return [text for text in (*project["dependencies"], *dev) if canonicalize_name(Requirement(text).name) not in HAS]


def download(requirements: Sequence[str], also: Sequence[str], folder: Path) -> None:
    for_machine = ("--python-version", PYTHON, *(word for name in PLATFORMS for word in ("--platform", name)))
    command = ("download", "--only-binary=:all:", *for_machine, "--dest", str(folder))
    # An impossible version of each of HAS: pip cannot choose one as a dependency of something else.
    never = folder / "never.txt"
    never.write_text("".join(f"{name}<0\n" for name in HAS))
    pip(*command, "--constraint", str(ROOT / "ci" / "constraints.txt"), "--constraint", str(never), *requirements)
    never.unlink()
    if also:
        pip(*command, "--no-deps", *also)


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--quiet"])
    if done.returncode:
        sys.exit(f"pip {words[0]}: got exit code {done.returncode}, want 0; nothing was written")


def told(wheels: Sequence[Path]) -> str:
    """A line for each wheel, and the total. Exits if the total is too large."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels}
    total = sum(sizes.values())
    lines = [f"{size / 2**20:6.2f} MiB  {name}" for name, size in sorted(sizes.items())]
    if total > LARGEST:
        largest = max(sizes, key=lambda name: sizes[name])
        sys.exit(f"wheels: got {total / 2**20:.2f} MiB, want at most {LARGEST // 2**20}; the largest is {largest}")
    return "\n".join([*lines, f"{total / 2**20:6.2f} MiB in all, of at most {LARGEST // 2**20}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("wheels"), metavar="FOLDER", help="default: wheels")
    parser.add_argument("--also", action="append", default=[], metavar="PACKAGE", help="without what it needs itself")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download(needed(), options.also, folder)
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would copy what an earlier build left there
        pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
        wheels = sorted(folder.glob("*.whl"))
        text = told(wheels)
        options.out.mkdir(parents=True, exist_ok=True)
        for earlier in options.out.glob("*.whl"):
            earlier.unlink()
        for wheel in wheels:
            shutil.move(wheel, options.out / wheel.name)
    print(text)


if __name__ == "__main__":
    main()
