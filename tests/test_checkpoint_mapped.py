"""`checkpoint --transformers`: names that the installed transformers would not map, and what stays unfilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.24", reason="its rules of names are read as 5.24 has them")

import tiny_models
from safetensors.torch import load_file, save_file

from moe_conformance.checkpoints.command import judged

FAMILIES = [
    family if family == "qwen3_moe" else pytest.param(family, marks=[pytest.mark.nightly, pytest.mark.sweep])
    for family in tiny_models.FAMILIES
]


def kinds(folder: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    found = judged(folder, engines=["transformers"]).findings
    return [(finding.level, finding.kind, finding.tensors) for finding in found if finding.kind != "engine"]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_of_what_transformers_wrote(family: str, original: bool, tmp_path: Path) -> None:
    """In the names of the hub, and in those of its modules."""
    tiny_models.build(family).save_pretrained(tmp_path, save_original_format=original)
    assert kinds(tmp_path) == []


def damaged(folder: Path, change: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    tiny_models.build("qwen3_moe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return kinds(folder)


def test_a_name_without_a_place_is_a_note(tmp_path: Path) -> None:
    """Outside the experts, where no record looks."""
    name = "model.layers.1.self_attn.q_proj.weight"
    found = damaged(tmp_path, lambda tensors: tensors.update({"model.layers.1.attn.q.weight": tensors.pop(name)}))
    assert found == [("defect", "unfilled", (name,)), ("note", "unmapped", ("model.layers.1.attn.q.weight",))]


def test_a_parameter_that_nothing_fills_is_a_defect(tmp_path: Path) -> None:
    found = damaged(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    assert found == [("defect", "unfilled", ("model.norm.weight",))]


def test_a_quantised_folder_is_said_not_to_be_judged(tmp_path: Path) -> None:
    tiny_models.build("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = [finding for finding in judged(tmp_path, engines=["transformers"]).findings if finding.kind == "engine"]
    assert ["not held against transformers: the folder is quantised" in note.got for note in notes] == [True]
