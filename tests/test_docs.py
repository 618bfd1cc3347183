"""The tutorial's adapter is short, is judged, and a fault in it is noticed; pages made from the code are whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import reference_pages
from every_check import CHECKS, verdict

from moe_conformance import cli
from moe_conformance.catalogue.case import catalogue
from moe_conformance.catalogue.clauses import CLAUSES
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.reporting.stream import read
from moe_conformance.running.discovery import Target

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
ADAPTER = PAGE.partition("```python\n")[2].partition("```")[0]
ENGINE = re.findall(r"^class (\w+)", ADAPTER, re.MULTILINE)[-1]
(COMMAND,) = (
    line.split()[1:]
    for line in PAGE.splitlines()
    if line.startswith(f"moe-conformance run --engine docs_adapter:{ENGINE}")
)

CONTRACT = reference_pages.contract()
# Pages that are kept, by name.
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name not in ("contract.md", "commands.md", "CHANGELOG.md")
}


def _judge(folder: Path, source: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The command of the page, where its adapter was saved under the name that the page gives it."""
    (folder / "docs_adapter.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "moe_conformance.cli", *COMMAND, "-n", "0", *more]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=folder, env=clean, text=True, capture_output=True)


def test_the_adapter_takes_under_forty_lines() -> None:
    assert 0 < len(ADAPTER.splitlines()) < 40


def test_the_adapter_is_called_otherwise_than_the_package_written_before_it() -> None:
    """Two engines of one name are refused, and the package is registered by then."""
    assert set(re.findall(r"new-engine ([\w-]+)", PAGE)).isdisjoint(re.findall(r'name = "([\w-]+)"', ADAPTER))


@pytest.mark.nightly
def test_the_adapter_is_judged_at_the_sizes_of_models_and_passes(tmp_path: Path) -> None:
    done = _judge(tmp_path, ADAPTER, "--out", "results")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = {result.case for result in read(tmp_path / "results") if result.verdict is Verdict.PASS}
    sizes = ("e128-k8", "e256-k8", "e384-k8", "e512-k22", "e896-k16")
    assert passed >= {f"route-deepseek-v3-{size}-t9-fp32-fine" for size in sizes}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("topk_group=spec.top_groups", "topk_group=spec.groups"),
        ('copy_(inputs.tensors["router.selection_bias"])', "zero_()"),
    ],
)
def test_a_fault_in_the_adapter_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported transformers, as the adapter does."""
    assert ADAPTER.count(right) == 1
    name = f"docs_adapter_with_{wrong.partition('(')[0].replace('=', '_').replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(ADAPTER.replace(right, wrong), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    judge = Judge(Target(name, f"{name}:{ENGINE}"))
    (row,) = (
        row
        for row in CHECKS
        if (row[2].id, row[1])
        == ("route-deepseek-v3-e256-k8-t9-fp32-fine", "test_ids_and_weights_are_those_of_the_method")
    )
    assert verdict(judge, *row) is Verdict.FAIL


def test_the_contract_has_every_clause_with_its_cases_and_every_class_a_mutant() -> None:
    rows = re.findall(r"^\| \*\*(\w+)\*\* `([\w.-]+)`: .* \| (\d+) \| (\d+) \|$", CONTRACT, re.MULTILINE)
    assert {name: level for level, name, *_ in rows} == {name: clause.level for name, clause in CLAUSES.items()}
    assert sum(int(cases) for *_, cases, _ in rows) == len(catalogue())
    assert all(int(cases) for *_, cases, _ in rows), "a clause without a case is judged of nobody"
    sections = re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", CONTRACT, re.MULTILINE | re.DOTALL)
    mutants = {name: sum(int(n) for n in re.findall(r"(\d+) \|$", text, re.MULTILINE)) for name, text in sections}
    assert [name for name, count in mutants.items() if not count] == []


def test_the_commands_are_those_of_the_first_help_text() -> None:
    page = reference_pages.commands()
    listed = re.findall(r"^    ([a-z-]+)", page.partition("## moe-conformance run")[0], re.MULTILINE)
    assert re.findall(r"^## moe-conformance ([a-z-]+)$", page, re.MULTILINE) == listed
    assert "--engine-timeout SECONDS" in page


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    """Paths from a folder of the checkout, or of the package; capitals stand for a name."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    named = {name for name in re.findall(r"`([a-z_]+/[\w./-]*)`", prose) if not re.search(r"[A-Z]{2}", name)}
    places = [ROOT, ROOT / "moe_conformance"]
    mine = {name for name in named if any((place / name.partition("/")[0]).is_dir() for place in places)}
    made = {"kernels/tuned/", "results/junit.xml", "results/summary.md"}
    assert [name for name in sorted(mine - made) if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one(page: str) -> None:
    """What `run` does not know goes to pytest."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if line.startswith("moe-conformance "):
            words = shlex.split(line, comments=True)[1:]
            _, others = cli._parser().parse_known_args(words)
            assert words[0] == "run" or others == [], line
