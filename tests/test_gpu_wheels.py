"""What a GPU machine without a network is given: all that it lacks, nothing that it has, within a size."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import wheels
from packaging.requirements import Requirement


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Names and sizes of what pip would leave in the folder: change it before the call."""
    files = {"pytest-9-py3-none-any.whl": 3, "moe_conformance-1-py3-none-any.whl": 5}

    def pip(*words: str) -> None:
        folder = Path(words[words.index("--dest" if words[0] == "download" else "--wheel-dir") + 1])
        for name, size in files.items():
            if name.startswith("moe") == (words[0] == "wheel"):
                with (folder / name).open("wb") as file:
                    file.truncate(size)
        if words[0] == "download":
            constraints = [Path(words[i + 1]) for i, word in enumerate(words) if word == "--constraint"]
            assert "torch<0\n" in "".join(path.read_text() for path in constraints)

    monkeypatch.setattr(wheels, "pip", pip)
    return files


def test_what_the_machine_has_is_not_asked_for() -> None:
    names = {Requirement(text).name for text in wheels.needed()}
    assert {"pytest", "pytest-xdist", "syrupy", "click"} <= names
    assert not names & {"torch", "triton", "transformers", "numpy", "safetensors"}


def test_the_folder_has_these_wheels_alone_and_their_size_is_said(
    downloaded: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pytest-8-py3-none-any.whl").touch()
    wheels.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == downloaded.keys()
    assert "in all, of at most 30" in capsys.readouterr().out


def test_too_much_is_refused_and_the_folder_stays(downloaded: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "earlier-1-py3-none-any.whl").touch()
    downloaded["torch-2-cp312-cp312-linux_x86_64.whl"] = 31 * 2**20
    with pytest.raises(SystemExit, match=r"got 31.00 MiB, want at most 30; the largest is torch-2"):
        wheels.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["earlier-1-py3-none-any.whl"]


def script(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """ci/gpu.sh from another folder, and what it has asked of a PYTHON that does nothing."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "$PYTHONPATH" >> {tmp_path}/asked\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": "mine"}
    command = ["bash", str(wheels.ROOT / "ci" / "gpu.sh"), *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    return ran, (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_the_job_installs_the_wheels_beside_pythons_own_packages_and_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "moe_conformance-1-py3-none-any.whl").touch()
    ran, asked = script(tmp_path, "--budget", "5", "--wheels", "given", "--rehearse")
    assert ran.returncode == 0, ran.stderr
    site = asked[1].partition(":")[0]
    install = f"-m pip install --quiet --no-index --no-deps --target {site} {tmp_path}/given/moe_conformance-1-py3-none"
    assert asked[0].startswith(install) and asked[1] == f"{site}:mine"
    assert asked[2:] == ["tools/gpu_job.py --budget 5 --rehearse", f"{site}:mine"] and not Path(site).exists()


@pytest.mark.parametrize("folder", ("empty", "missing"))
def test_a_folder_without_wheels_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    ran, asked = script(tmp_path, "--wheels", folder)
    assert ran.returncode == 2 and f"got {tmp_path}/{folder}, want a folder that tools/wheels.py has" in ran.stderr
    assert asked == []
