"""The package that `new-engine` writes: whole or not at all, clean, and judged as it is."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from every_check import CHECKS, verdict

from moe_conformance.catalogue.case import in_tier
from moe_conformance.errors import UsageError
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.protocol.stages import STAGES
from moe_conformance.running import known
from moe_conformance.running.discovery import Target
from moe_conformance.starter.new_engine import adapter, class_name, new_engine
from moe_conformance.starter.stages import OFFERED, Starter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every stage that there is a start for."""
    return new_engine("brand-new", list(OFFERED), tmp_path_factory.mktemp("new"))


def smoke(stage: str, folder: Path, name: str, source: str) -> set[Verdict]:
    """The verdicts of the smoke cases of a stage, in this process."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    judge = Judge(Target(name, f"{name}:{class_name('brand-new')}"))
    return {verdict(judge, *row) for row in CHECKS if row[2].stage == stage and in_tier(row[2], "smoke")}


@pytest.mark.parametrize("stage", OFFERED)
def test_each_stage_passes_the_smoke_tier_as_written(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = smoke(stage, tmp_path, f"written_{stage}", adapter("brand-new", [stage]))
    assert Verdict.PASS in found and found <= {Verdict.PASS, Verdict.UNSUPPORTED}


FAULTS = {
    "route": ("/ (weights", "* (weights"),
    "align": ("pairs + padding\n", "padding + padding\n"),
    "experts": ("if expert >= 0", "if expert != 0"),
    "layer": ("[..., :width]", "[..., :wide.shape[-1]]"),
    "capture_session": ("not 0 <= layer_id", "not -9 <= layer_id"),
    "expert_map": ("cumsum(0) - 1", "cumsum(0)"),
}


@pytest.mark.parametrize("stage", OFFERED)
def test_a_fault_in_each_is_noticed(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = FAULTS[stage]
    source = adapter("brand-new", [stage])
    assert source.count(right) == 1
    monkeypatch.syspath_prepend(tmp_path)
    assert Verdict.FAIL in smoke(stage, tmp_path, f"faulty_{stage}", source.replace(right, wrong))


def test_every_stage_works_or_is_a_stub_with_its_words() -> None:
    (written,) = (node for node in ast.parse(adapter("brand-new", ["align"])).body if isinstance(node, ast.ClassDef))
    functions = {node.name: node for node in written.body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() - {"info", "capabilities", "capture_reader"} == set(STAGES)
    stubs = {name for name, node in functions.items() if "not written yet" in ast.unparse(node.body[-1])}
    assert stubs == {*STAGES, "capture_reader"} - {"align"}
    assert all(ast.get_docstring(functions[name]) and functions[name].returns for name in stubs)


@pytest.mark.parametrize("stages", [list(OFFERED), *([stage] for stage in OFFERED)], ids=lambda found: found[-1])
def test_what_is_written_is_clean(stages: list[str], tmp_path: Path) -> None:
    folder = new_engine("brand-new", stages, tmp_path)
    for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, folder], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_names_what_it_has(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "brand-new-conformance"
    (path,) = project["entry-points"]["moe_conformance.engines"].values()
    assert path == "brand_new_conformance.adapter:BrandNewAdapter"
    assert "class BrandNewAdapter(Engine):" in (package / "brand_new_conformance" / "adapter.py").read_text("utf-8")
    assert known.read(package / "known_failures.toml") == known.KnownFailures("brand-new", {})
    files = [file.read_text(encoding="utf-8") for file in package.rglob("*") if file.is_file()]
    assert not [text for text in files if "@NAME@" in text or "@MODULE@" in text or "@VERSION@" in text]


@pytest.mark.parametrize(
    ("name", "stages", "words"),
    [
        ("2fast", ["layer"], "name: got '2fast', want letters and digits"),
        ("../up", ["layer"], "name: got '../up', want letters and digits"),
        ("a--b", ["layer"], "name: got 'a--b'"),
        ("naïve", ["layer"], "name: got 'naïve'"),
        ("", ["layer"], "name: got ''"),
        ("triton", ["layer"], "which is registered as moe_conformance.engines.triton:Triton"),
        ("there", ["layer"], "there-conformance exists"),
        ("importable", ["layer"], "a package importable_conformance is installed"),
        ("new", ["layr"], "did you mean 'layer'?"),
        (
            "new",
            ["layer", "generate"],
            "stage: got 'generate', which no few lines can answer; want one of route, align",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    name: str, stages: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there-conformance").mkdir()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "importable_conformance.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as refused:
        new_engine(name, stages, tmp_path)
    assert words in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Path.write_text

    def fills(self: Path, *arguments: str, **keywords: str) -> int:
        written.append(self)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "write_text", fills)
    with pytest.raises(UsageError, match="No space left on device; name another folder"):
        new_engine("brand-new", ["layer"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="which is no folder; make it first"):
        new_engine("brand-new", ["layer"], tmp_path / "absent")


def test_the_layer_is_that_of_the_readme() -> None:
    lines = inspect.getsource(Starter.layer).partition("import functional as F\n")[2]
    assert lines in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_the_packages_own_test_passes(package: Path) -> None:
    done = _in(package, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.nightly
def test_a_fault_fails_the_packages_own_test(tmp_path: Path) -> None:
    folder = new_engine("brand-new", ["expert_map"], tmp_path)
    file = folder / "brand_new_conformance" / "adapter.py"
    file.write_text(file.read_text(encoding="utf-8").replace(*FAULTS["expert_map"]), encoding="utf-8")
    done = _in(folder, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1 and "every expert has one place" in done.stdout, done.stdout + done.stderr


def _in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=clean, text=True, capture_output=True)
