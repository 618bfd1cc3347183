"""Results of a GPU job become a section of RESULTS.md and kept tiles."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import gpu_job
import pytest
from gpu_steps import STEPS, Step, conformance

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import gpu_results

pytestmark = pytest.mark.nightly
TILE = {"block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3}
PEERS = ("eager", "batched_mm", "grouped_mm")
KEY = "bfloat16 E128 K8 H2816 F704"


def entry(us: float) -> dict[str, Any]:
    return {"block_m": 16, "gate_up": TILE, "down": TILE, "aligned": True, "us": us, "default_us": 9.0}


def results(folder: Path, device: str, us: float, mode: str = "GPU job", **tokens: dict[str, Any]) -> Path:
    """What a job leaves that got as far as the tuning."""
    folder.mkdir()
    facts = {"name": device, "versions": {"torch": "2.11.0"}, "driver": {"driver_version": "580.1"}}
    steps = {
        "targets": gpu_job.Record("failed", 61.5, 90.0, "exit code 1"),
        "launches": gpu_job.Record("failed", 20.0, note="exit 1"),
    }
    gpu_job.State(mode, steps, facts, calls=["2026-12-01 09:00 UTC: `ci/gpu.sh`"]).save(folder / "state.json")
    with zipfile.ZipFile(folder / "results.zip", "w") as file:
        file.writestr("targets/kernels.md", f"`kernels.py`\n\n| experts | {us} |\n\n## Targets\n\n- NOT MET")
        file.writestr("launches/twins.jsonl", '{"verdict": "right"}\n{"verdict": "right"}\n{"verdict": "wrong"}\n')
        configs = {KEY: {number.removeprefix("t"): own for number, own in tokens.items()}}
        file.writestr("tuning/tuned/NVIDIA_H200.json", json.dumps({"device": device, "configs": configs}))
    return folder


def test_a_section_a_device_is_replaced_as_a_whole_and_tiles_are_merged(tmp_path: Path) -> None:
    into = tmp_path / "into"
    for number, (device, us, tokens) in enumerate((
        ("NVIDIA H200", 5.0, {"t64": entry(5.0), "t8": entry(4.0)}),
        ("NVIDIA H100", 7.0, {}),
        ("NVIDIA H200", 6.0, {"t64": entry(6.0)}),
    )):  # fmt: skip
        gpu_results.main([str(results(tmp_path / str(number), device, us, **tokens)), "--into", str(into)])
    text = (into / "RESULTS.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## NVIDIA H200", "## NVIDIA H100"]
    assert "| experts | 6.0 |" in text and "| experts | 7.0 |" in text and "| experts | 5.0 |" not in text
    assert "driver 580.1, torch 2.11.0" in text and "2026-12-01 09:00 UTC: `ci/gpu.sh`" in text
    assert (
        "| targets | failed | 61.5 | exit code 1 |" in text
        and "| launches | failed | 20 | exit 1; 2 right, 1 wrong |" in text
    )
    kept = json.loads((into / "kernels" / "tuned" / "NVIDIA_H200.json").read_text())["configs"][KEY]
    assert {tokens: own["us"] for tokens, own in kept.items()} == {"8": 4.0, "64": 6.0} and list(kept) == ["8", "64"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        gpu_results.main(arguments)
    return capsys.readouterr().err


def test_what_is_no_result_of_a_gpu_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal = results(tmp_path / "rehearsal", "no GPU", 5.0, "rehearsal")
    assert "got a rehearsal, want results of a GPU" in refused(capsys, str(rehearsal))
    assert "want its --out" in refused(capsys, str(tmp_path), "--into", str(tmp_path / "into"))
    wrong = results(tmp_path / "wrong", "NVIDIA H200", 5.0, t64=entry(5.0) | {"block_m": 17})
    assert "block_m 17" in refused(capsys, str(wrong), "--into", str(tmp_path / "into"))
    (wrong / "results.zip").write_bytes(b"PK")
    assert "not a zip file" in refused(capsys, str(wrong), "--into", str(tmp_path / "into"))
    assert not (tmp_path / "into").exists()


def test_a_rehearsal_gives_the_same_section_with_all_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "1"})
    steps = [step for step in STEPS if step.name in ("device", "quick")]
    steps.append(Step("reference", (), 1, 60, rehearsal=conformance("reference", tier="smoke")))
    assert gpu_job.main(["--rehearse", "--out", str(tmp_path / "out")], steps) == 0
    gpu_results.main([str(tmp_path / "out"), "--into", str(tmp_path / "into")])
    text = (tmp_path / "into" / "RESULTS.md").read_text()
    assert "## no GPU (rehearsal)" in text and f"`ci/gpu.sh --rehearse --out {tmp_path / 'out'}`" in text
    assert "### quick" in text and "No column says how fast a kernel is" in text
    assert "| reference | ok |" in text and " pass" in text
    experts = next(line for line in text.splitlines() if line.startswith("| experts | gemma4 |"))
    for peer in ("torch eager", "torch.compile", "torch grouped_mm", *(f"transformers {name}" for name in PEERS)):
        assert f"{peer} " in experts
