"""The journey of a new user, step by step and timed: python tools/journey.py DIST [--site FOLDER] [--out FILE]

DIST has the wheel that ci/dist.sh makes. It becomes an index on this disk, from which an empty environment is filled,
in a folder far from the checkout; after that nothing is fetched. Then come doctor, new-engine, a first verdict, the
report, the test of the new package, and a fault in the engine, which its job must notice. Exit code 1 at the first
step that is not as it should be.

--site: a folder of installed packages that serve as the dependencies, so that torch is not fetched again. What the
pinning engine wants is fetched in any case, and comes before them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What an engine in the same environment pins: the lowest that the metadata admits of some, from ci/floors.txt.
PINNED = ("packaging", "pytest", "pytest-xdist", "syrupy")
ENGINE = "my-engine"


class Journey:
    """The environment of one journey, and what its steps took."""

    def __init__(self, dist: Path, site: Path | None, folder: Path) -> None:
        self.site, self.folder, self.index = site, folder, folder / "index"
        self.took: list[tuple[str, float]] = []
        self.index.mkdir()
        (self.wheel,) = dist.glob("*.whl")
        shutil.copy(self.wheel, self.index)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PIP_"))}
        self.environment = kept | {"PATH": f"{folder / 'env' / 'bin'}{os.pathsep}{kept['PATH']}"}
        # From this index only, whatever this machine's own settings are.
        self.environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}

    def step(self, name: str, *command: str | Path, code: int = 0, words: Sequence[str] = (), where: str = ".") -> str:
        """Run one step; returns what it printed. Ends the journey if the exit code or the words differ."""
        started = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder / where,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        took = time.perf_counter() - started
        self.took.append((name, took))
        print(f"{took:7.1f} s  {name}", flush=True)
        absent = [word for word in words if word not in done.stdout]
        if done.returncode != code or absent:
            print(done.stdout[-8000:])
            without = f" without {', '.join(map(repr, absent))}" if absent else ""
            sys.exit(f"journey: {name}: got exit code {done.returncode}{without}, want {code}; its output is above")
        return done.stdout

    def pins(self) -> list[str]:
        """The lines of ci/floors.txt for PINNED."""
        lines = (ROOT / "ci" / "floors.txt").read_text(encoding="utf-8").splitlines()
        return [line for name in PINNED for line in lines if line.startswith(f"{name}==")]

    def fill_index(self) -> None:
        """What is fetched, by this machine's own pip and its settings; afterwards nothing is."""
        fetched = [*self.pins(), "setuptools>=77"]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", self.index]
        subprocess.run([*download, *fetched], check=True, cwd=self.folder)
        if self.site is None:
            constraints = ROOT / "ci" / "constraints.txt"
            subprocess.run([*download, "-c", constraints, self.wheel], check=True, cwd=self.folder)
        needs = ", ".join(f'"{line}"' for line in self.pins())
        source = self.folder / "pinning"
        source.mkdir()
        (source / "pinning_engine.py").touch()
        (source / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "pinning-engine"\nversion = "1"\ndependencies = [{needs}]\n'
            '[tool.setuptools]\npy-modules = ["pinning_engine"]\n',
            encoding="utf-8",
        )

    def go(self) -> None:
        env = self.folder / "env"
        self.step("an empty environment", sys.executable, "-m", "venv", env)
        if self.site is not None:
            (packages,) = env.glob("lib/python*/site-packages")
            (packages / "dependencies.pth").write_text(f"{self.site.resolve()}\n", encoding="utf-8")
        # --ignore-installed: the folder of --site may have this package, too.
        only = ["--no-deps", "--ignore-installed"] if self.site is not None else []
        self.step("install from the index", "pip", "install", "--quiet", *only, "moe-conformance")
        home = self.step(
            "where it lies", "python", "-c", "import moe_conformance as m; print(m.__file__, m.__version__)"
        )
        if str(env.resolve()) not in str(Path(home.split()[0]).resolve()):
            sys.exit(f"journey: got {home.split()[0]}, want the package of {env}")
        self.step("doctor", "moe-conformance", "doctor", words=["reference", "starts"])
        self.step("smoke, the reference", *self.run("reference", "--tier", "smoke"), words=["reference"])

        self.step("new-engine", "moe-conformance", "new-engine", ENGINE, "--stage", "layer")
        where = f"{ENGINE}-conformance"
        self.step("install the adapter", "pip", "install", "--quiet", "--no-deps", "-e", ".", where=where)
        smoke = self.run(ENGINE, "--tier", "smoke", "--stage", "layer")
        self.step("a first verdict", *smoke, words=["layer(inputs: LayerInputs)", ENGINE], where=where)
        self.job("the job of its CI", where)
        self.report(self.results)
        own = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        self.step("its own test", *own, words=["1 passed"], where=where)

        adapter = self.folder / where / "my_engine_conformance" / "adapter.py"
        right = adapter.read_text(encoding="utf-8")
        adapter.write_text(right.replace("[..., :width]", ""), encoding="utf-8")
        self.job("the job, with a fault", where, code=1, words=["::error title=fail"])
        adapter.write_text(right, encoding="utf-8")

        self.step("beside an engine that pins", "pip", "install", "--quiet", "./pinning")
        versions = [line.partition("==")[2] for line in self.pins()]
        imported = "import packaging, pytest, xdist, syrupy; from importlib.metadata import version as v\n"
        imported += f"print(*map(v, {PINNED}))"
        self.step("what it pins is there", "python", "-c", imported, words=[" ".join(versions)])
        self.step("smoke, beside it", *smoke, words=[ENGINE], where=where)
        if self.site is None:
            self.step("pip check", "pip", "check")

    def job(self, name: str, where: str, **wanted: Any) -> None:
        """What the new package's workflow does: the action's own script, as a runner starts it."""
        read = "import sys, yaml; steps = yaml.safe_load(open(sys.argv[1]))['runs']['steps']\n"
        read += "print(next(step['run'] for step in steps if step.get('id') == 'judge'))"
        script = self.folder / "judge.sh"
        script.write_text(self.step("action.yml", "python", "-c", read, ROOT / "action.yml"), encoding="utf-8")
        files = {"GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary", "RUNNER_TEMP": "."}
        self.environment |= {name: str(self.folder / file) for name, file in files.items()}
        self.environment |= {"ENGINE": ENGINE, "KNOWN": "known_failures.toml", "TIER": "core", "ARGUMENTS": ""}
        self.step(name, "bash", "-eo", "pipefail", script, where=where, **wanted)

    @property
    def results(self) -> Path:
        return self.folder / "conformance"

    def report(self, results: Path) -> None:
        """The page for colleagues, where this release has one."""
        if "\n    report " in self.step("--help", "moe-conformance", "--help"):
            self.step("the report", "moe-conformance", "report", results, "--html", "report.html")

    def run(self, engine: str, *options: str) -> list[str]:
        return ["moe-conformance", "run", "--engine", engine, *options]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--out", type=Path, help="a file for the times, as a Markdown table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="journey-") as folder:
        journey = Journey(options.dist.resolve(), options.site, Path(folder).resolve())
        journey.fill_index()
        journey.go()
    names = [name for name, _ in journey.took]
    first = sum(took for _, took in journey.took[: names.index("a first verdict") + 1])
    print(f"{first:7.1f} s  from nothing to a first verdict, machine time")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"| {name} | {took:.1f} |\n" for name, took in journey.took)
        options.out.write_text(f"| step | seconds |\n|---|---|\n{rows}", encoding="utf-8")


if __name__ == "__main__":
    main()
