"""What is installed: one top-level package, with its data, that judges an engine from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from moe_conformance.reporting.stream import read
from moe_conformance.starter.stages import OFFERED

ROOT = Path(__file__).parent.parent


# The adapter that the README prints, word for word.
README_ADAPTER = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools leaves a build folder beside what it builds.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    # As benchmarks/tune.py leaves one; the tree itself may have none.
    tuned = folder / "source" / "kernels" / "tuned" / "Some_GPU.json"
    tuned.parent.mkdir(exist_ok=True)
    tuned.write_text('{"configs": {}}')
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(folder / "source")],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the wheel comes before the checkout."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    # CI, which a runner sets, refuses --in-process.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST") and name != "CI"}
    return {**clean, "PYTHONPATH": str(site)}


def test_the_wheel_installs_nothing_but_its_namespace(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"moe_conformance"}
    assert "moe_conformance/py.typed" in names
    assert any(name.startswith("moe_conformance/golden/closure-capture/") for name in names)
    assert "moe_conformance/kernels/tuned/Some_GPU.json" in names
    templates = {file.name for file in (ROOT / "moe_conformance" / "reporting" / "templates").iterdir()}
    assert templates == {name.rpartition("/")[2] for name in names if "/reporting/templates/" in name} != set()


def packages_of_the_tree() -> dict[str, Path]:
    """Package name -> its folder, for every folder with __init__.py that is tracked: the package's own, and those that
    pyproject.toml maps below it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    mapped = {folder: package for package, folder in settings["package-dir"].items()}
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*/__init__.py"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = [Path(name).parent for name in files.split("\0") if name and (ROOT / name).is_file()]
    return {".".join((mapped[folder.parts[0]], *folder.parts[1:])): ROOT / folder for folder in folders}


def test_pyproject_lists_every_package_and_no_other() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages_of_the_tree())


def test_the_wheel_has_every_module_of_every_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in packages_of_the_tree().items()
        for file in folder.glob("*.py")
    }
    assert here - names == set()
    assert {name for name in names if name.endswith(".py")} - here == set()


def test_the_wheel_has_every_file_that_is_read(wheel: Path) -> None:
    """Goldens, templates, durations, pytest.ini: all that lies in a package's folder and is no module."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in settings["package-dir"].items():
        listed = ["git", "ls-files", "-z", "--", folder]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        data = {Path(name).relative_to(folder) for name in files if name and not name.endswith((".py", ".md"))}
        assert {f"{package.replace('.', '/')}/{name.as_posix()}" for name in data} - names == set()


@pytest.mark.nightly
def test_the_wheel_judges_the_reference_by_name_of_its_package(installed: dict[str, str], tmp_path: Path) -> None:
    command = ["-m", "pytest", "--pyargs", "moe_conformance.suites", "--moe-engine", "reference", "--moe-tier", "smoke"]
    done = subprocess.run([sys.executable, *command, "-q"], cwd=tmp_path, env=installed, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference" in done.stdout and " passed" in done.stdout and "failed" not in done.stdout.splitlines()[-1]
    assert str(ROOT) not in done.stdout


@pytest.mark.nightly
def test_the_readmes_adapter_is_judged_without_touching_this_package(installed: dict[str, str], tmp_path: Path) -> None:
    assert 0 < len(README_ADAPTER.splitlines()) < 60
    (tmp_path / "my_engine.py").write_text(README_ADAPTER)
    command = ["-m", "moe_conformance.cli", "run", "--engine", "my_engine:MyEngine", "-n", "0", "--tier", "smoke"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=installed, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my-engine" in done.stdout


@pytest.mark.nightly
def test_a_fault_in_the_readmes_adapter_is_noticed(installed: dict[str, str], tmp_path: Path) -> None:
    unpadded = "[..., :width]"
    assert README_ADAPTER.count(unpadded) == 1
    (tmp_path / "my_engine.py").write_text(README_ADAPTER.replace(unpadded, ""))
    command = ["-m", "moe_conformance.cli", "run", "--engine", "my_engine:MyEngine", "--tier", "smoke", "--in-process"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=installed, text=True, capture_output=True)
    assert done.returncode == 1
    assert "must be cut before" in done.stdout


@pytest.mark.nightly
def test_a_worker_that_is_called_by_its_path_judges(installed: dict[str, str], tmp_path: Path) -> None:
    """As docs/ci.md says: it is given the controller's import path, and node ids begin at the suites' folder."""
    options = [
        "--moe-engine=reference",
        "--moe-case=layer-tiny-padded-hidden",
        "--moe-case=align-e60-k6",
        "--dist=loadscope",
    ]
    options += [f"--tx=popen//python={sys.executable}", "--moe-out=out"]
    command = [sys.executable, "-m", "pytest", "--pyargs", "moe_conformance.suites", *options]
    done = subprocess.run(command, cwd=tmp_path, env=installed, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {result.case for result in read(tmp_path / "out")} == {"layer-tiny-padded-hidden", "align-e60-k6"}


@pytest.mark.nightly
def test_what_new_engine_writes_is_typed(installed: dict[str, str], tmp_path: Path) -> None:
    """Against the installed package, whose types are seen there alone."""
    stages = [f"--stage={stage}" for stage in OFFERED]
    written = [sys.executable, "-m", "moe_conformance", "new-engine", "brand-new", *stages]
    subprocess.run(written, cwd=tmp_path, env=installed, check=True)
    folder = tmp_path / "brand-new-conformance"
    mypy = [sys.executable, "-m", "mypy", "-p", "brand_new_conformance", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(mypy, cwd=folder, env=installed, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    adapter = folder / "brand_new_conformance" / "adapter.py"
    right = "def route(self, inputs: RouteInputs) -> Routing"
    text = adapter.read_text(encoding="utf-8")
    assert text.count(right) == 1
    adapter.write_text(text.replace(right, "def route(self, inputs: int) -> Routing"), encoding="utf-8")
    assert subprocess.run(mypy, cwd=folder, env=installed, capture_output=True).returncode == 1
