"""The pytest plugin is inert in other people's sessions, and the checkout shadows nobody's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from moe_conformance.running import plugin as pytest_plugin

ROOT = Path(__file__).parent.parent
PROBE = """
import os, sys
BEFORE = dict(os.environ)
def pytest_sessionfinish():
    ours = sorted(name for name in sys.modules if name.startswith("moe_conformance"))
    heavy = sorted({"torch", "triton", "transformers", "numpy"} & sys.modules.keys())
    changed = sorted(k for k in os.environ.keys() | BEFORE.keys()
                     if os.environ.get(k) != BEFORE.get(k) and not k.startswith("PYTEST"))
    print("PROBE", ours, heavy, changed)
"""


def pytest_in(folder: Path, *arguments: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**clean, **environment}, text=True, capture_output=True
    )
    return done.stdout + done.stderr


def test_an_empty_session_loads_the_door_and_nothing_behind_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(PROBE)
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    printed = pytest_in(tmp_path, "-m", "pytest", "-s", "-p", "no:cacheprovider")
    assert "PROBE ['moe_conformance', 'moe_conformance.running', 'moe_conformance.running.plugin'] [] []" in printed


def test_the_plugin_adds_less_than_50_ms(tmp_path: Path) -> None:
    """Importing it and its look at the arguments, after pytest itself; the quickest of three, as machines are noisy."""
    code = """
import time, types, pathlib, pytest
started = time.perf_counter()
from moe_conformance.running import plugin as pytest_plugin
config = types.SimpleNamespace(args=["tests"], invocation_params=types.SimpleNamespace(dir=pathlib.Path.cwd()))
pytest_plugin.pytest_configure(config)
print(time.perf_counter() - started)
"""
    assert min(float(pytest_in(tmp_path, "-c", code)) for _ in range(3)) < 0.050


@pytest.mark.parametrize(
    ("place", "is_ours"),
    [(ROOT / "suites" / "layer", True), (ROOT / "suites", True), (ROOT, True), (ROOT.parent, False)],
)
def test_a_folder_that_holds_this_package_somewhere_is_not_a_run_of_its_suites(place: Path, is_ours: bool) -> None:
    """As where an environment lies inside somebody's project."""
    config = SimpleNamespace(args=[str(place)], invocation_params=SimpleNamespace(dir=Path.cwd()))
    assert pytest_plugin._runs_suites(cast(pytest.Config, config)) is is_ours


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import pytest, sys; sys.exit(pytest.main())"], ["-m", "pytest"], ["-m", "pytest", "-n", "2"]],
    ids=["pytest", "python -m pytest", "xdist"],
)
def test_kernels_stays_hugging_faces_in_the_checkout(tmp_path: Path, arguments: list[str]) -> None:
    """In a folder laid out as ours, with our conftest.py and configuration, `kernels` is the installed package."""
    installed, checkout = tmp_path / "site", tmp_path / "checkout"
    for place, text in ((installed, "HUGGING_FACE = True\n"), (checkout, "HUGGING_FACE = False\n")):
        (place / "kernels").mkdir(parents=True)
        (place / "kernels" / "__init__.py").write_text(text)
    for name in ("conftest.py", "pyproject.toml"):
        (checkout / name).write_text((ROOT / name).read_text())
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_name.py").write_text(
        "def test_name():\n    import kernels\n    assert kernels.HUGGING_FACE\n"
    )
    printed = pytest_in(checkout, *arguments, PYTHONPATH=str(installed))
    assert "1 passed" in printed, printed


def test_an_engine_process_started_in_the_checkout_sees_hugging_faces_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("HUGGING_FACE = True\n")
    there = "from moe_conformance.running.discovery import extend_path"
    code = f"{there}; extend_path(); import kernels; print(kernels.HUGGING_FACE)"
    assert pytest_in(ROOT, "-P", "-c", code, PYTHONPATH=str(tmp_path)).strip() == "True"
