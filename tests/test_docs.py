"""The adapter that the documentation shows: it is short, it is judged, and a fault in it is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADAPTER = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
CASES = ("route-deepseek-v3-e256-k8-t9-fp32-fine", "route-biased-e384-k8-t9-fp32-fine")


def _judge(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "docs_adapter.py").write_text(source, encoding="utf-8")
    command = ["-m", "moe_conformance.cli", "run", "--engine", "docs_adapter:DeepseekRouter", "-n", "0"]
    command += [argument for case in CASES for argument in ("--case", case)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=clean, text=True, capture_output=True)


def test_the_adapter_takes_under_forty_lines() -> None:
    assert 0 < len(ADAPTER.splitlines()) < 40


def test_the_adapter_is_judged_and_passes(tmp_path: Path) -> None:
    done = _judge(tmp_path, ADAPTER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepseek-router  2/2" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("topk_group=spec.top_groups", "topk_group=spec.groups"),
        ('copy_(inputs.tensors["router.selection_bias"])', "zero_()"),
        ("routed_scaling_factor=spec.scale", "routed_scaling_factor=1.0"),
        ("inputs.logits.float()", "inputs.logits.bfloat16().float()"),
    ],
)
def test_a_fault_in_the_adapter_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    assert ADAPTER.count(right) == 1
    done = _judge(tmp_path, ADAPTER.replace(right, wrong))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "routing-semantics" in done.stdout and "wrong" in done.stdout
