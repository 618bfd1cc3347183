"""Tries the lowest versions that pyproject.toml admits: judges, and runs tests, in an environment made from
ci/floors.txt.

torch is the one of ci/constraints.txt, or with --torch the lowest, too. The transformers adapter has a floor of its own
above the package's: its release comes last. The environment is kept, and rebuilt when a file that defines it changes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import click
from packaging.requirements import Requirement

from moe_conformance.engines.transformers import OLDEST

ROOT = Path(__file__).resolve().parent.parent
FLOORS, PINS = ROOT / "ci" / "floors.txt", ROOT / "ci" / "constraints.txt"
# A minute of tests that use each package with a floor: the plug-in's hooks (pytest, xdist), goldens (syrupy), one-byte
# floats (ml_dtypes), random specs (hypothesis), kernels (triton), checkpoints (safetensors), tools (click).
TESTS = (
    "test_plugin", "test_scheduler", "test_lost_results", "test_cli", "test_goldens", "test_small_floats",
    "test_oracle_ties", "test_operators", "test_targets", "test_quote", "test_floors", "test_stored_experts",
)  # fmt: skip
SMOKE = ("-m", "moe_conformance.cli", "run", "--tier", "smoke", "-n", "2")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--torch", "lowest_torch", is_flag=True, help="torch at its lowest, too; an index must have it.")
@click.option("--env", "folder", default=ROOT / ".venv" / "floors", type=click.Path(path_type=Path), help="Made here.")
def main(lowest_torch: bool, folder: Path) -> None:
    """Make the environment of the floors, judge the smoke cases in it and run a minute of tests.

    Exit code 0: everything passed. 1: something failed; it is the last thing printed.
    """
    pins = floors(FLOORS)
    if not lowest_torch:
        pins["torch"] = floors(PINS)["torch"]
    recipe = [sys.version, *pins.values(), (ROOT / "pyproject.toml").read_text(encoding="utf-8")]
    wanted = hashlib.sha256(repr(recipe).encode()).hexdigest()
    python, marker = folder / "bin" / "python", folder / "made-from"
    if not marker.exists() or marker.read_text() != wanted:
        make(folder, python, pins)
        marker.write_text(wanted)
    pip(python, "install", pins["transformers"], pins["safetensors"], pins["torch"])
    call(python, *SMOKE, "--engine", "reference", "--engine", "triton")
    call(python, "-m", "pytest", "-q", "-n", "2", *(f"tests/{name}.py" for name in TESTS))
    pip(python, "install", f"transformers=={OLDEST}", pins["torch"])
    call(python, *SMOKE, "--engine", "transformers")


def floors(file: Path) -> dict[str, str]:
    """Requirement lines, by name."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {Requirement(line).name: line for line in lines}


def make(folder: Path, python: Path, pins: dict[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    call(sys.executable, "-m", "venv", folder)
    # Built first, by the lowest setuptools and what it bundles; torch, which comes next, wants it newer.
    pip(python, "install", pins["setuptools"])
    pip(python, "install", "--no-build-isolation", "--no-deps", "--editable", ROOT)
    # The pinned build satisfies every range that follows, so nothing pulls another one.
    pip(python, "install", pins["torch"])
    pip(python, "install", *(line for name, line in pins.items() if name != "setuptools"))
    pip(python, "check")


def pip(python: Path, *arguments: str | Path) -> None:
    call(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def call(*command: str | Path) -> None:
    """Run it in the checkout; end with its exit code if it fails."""
    if code := subprocess.run([str(part) for part in command], cwd=ROOT).returncode:
        click.echo(f"floors: exit code {code} of {' '.join(map(str, command))}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
