"""The families that transformers has and no record describes are named: by doctor, and by the report of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_conformance import cli
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.installed import Installed, installed, read
from moe_conformance.reporting.report import strangers

# One config as transformers writes them, one whose experts are in a part of it, and one of a model without experts.
WHOLE = """
class SwarmTextConfig(PreTrainedConfig):
    model_type = "swarm_text"

    hidden_size: int = 64
    num_local_experts: int = 8


class SwarmConfig(PreTrainedConfig):
    model_type = "swarm"
    sub_configs = {"text_config": SwarmTextConfig}
"""
IN_A_PART = """
class HiveFFNConfig(PreTrainedConfig):
    def __init__(self, hidden_size=64, moe_num_experts: int = 8, **kwargs):
        self.moe_num_experts = moe_num_experts


class HiveConfig(PreTrainedConfig):
    model_type: str = "hive"
"""
DENSE = """
class LoneConfig(PreTrainedConfig):
    model_type = "lone"
    hidden_size: int = 64
"""


def test_a_family_is_found_by_the_number_of_its_experts() -> None:
    found = read("9.9", [WHOLE, IN_A_PART, DENSE])
    assert found.all == {"swarm", "swarm_text", "hive", "lone"}
    assert found.without_record == ("hive", "swarm_text")
    assert found.experts["hive"] == "HiveConfig"


def test_every_record_is_of_a_family_with_experts_that_transformers_has() -> None:
    pytest.importorskip("transformers", minversion="5.24", reason="the records are of transformers 5.24")
    found = installed()
    assert found is not None and not found.absent
    assert set(RECORDS) <= set(found.experts)


def fake_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers with one family more than there are records, and without all others."""
    models = folder / "transformers" / "models" / "swarm"
    models.mkdir(parents=True)
    (folder / "transformers" / "__init__.py").write_text("")
    (models / "configuration_swarm.py").write_text(WHOLE)
    information = folder / "transformers-9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_doctor_and_the_report_name_a_family_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_transformers(tmp_path, monkeypatch)
    assert installed() == Installed("9.9", frozenset({"swarm", "swarm_text"}), {"swarm_text": "SwarmTextConfig"})
    assert strangers() == [
        "nothing was judged of families with experts that transformers 9.9 has and no record describes: swarm_text"
    ]
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--families"])
    said = capsys.readouterr().out
    assert "families of transformers 9.9 without a record" in said and "swarm_text" in said
    assert said.count("; not in transformers 9.9") == len(RECORDS)


@pytest.mark.nightly
def test_a_run_says_of_which_families_nothing_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_transformers(tmp_path / "site", monkeypatch)
    command = [
        "run",
        "--engine",
        "reference",
        "--tier",
        "smoke",
        "--class",
        "permutation",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", *command, "-n", "0"], capture_output=True, text=True, check=True
    )
    wanted = "transformers 9.9 has and no record describes: swarm_text"
    assert wanted in done.stdout and wanted in (tmp_path / "out" / "summary.md").read_text()
