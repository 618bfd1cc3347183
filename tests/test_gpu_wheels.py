"""What a GPU machine without a network is given: all that it lacks, nothing that it has, within a size."""

from __future__ import annotations

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
