"""`moe-conformance routes`: true records are accepted, and what is wrong with others is named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from planted_routes import PLANTS, Record, recorded

from moe_conformance.routes.command import judged

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
NIGHTLY = pytest.mark.nightly
LENGTHS = (48, 40, 45, 37)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((family, dtype), marks=[NIGHTLY] * ((family, dtype) != ("qwen3_moe", "float32")))
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
    ],
    ids="-".join,
)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Record]]:
    """A family's tiny model, whose config says what it is served in, and a true record of it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), saved(*request.param, Path(folder))


def saved(family: str, dtype: str, folder: Path) -> Record:
    dense = {"decoder_sparse_step": 1, "mlp_only_layers": [1]} if family == "qwen3_moe" else {}
    model = tiny_models.build.__wrapped__(family, **dense)  # not kept: a list cannot be hashed
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    rng = np.random.default_rng(0)
    return recorded(folder, [rng.integers(0, 64, length).tolist() for length in LENGTHS], dtype)


def kinds(folder: Path, record: Record, path: Path) -> list[str]:
    return [finding.kind for finding in judged(folder, record.save(path)).findings]


def test_a_true_record_is_accepted(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    found = judged(folder, record.save(tmp_path / "record.safetensors"))
    assert (found.findings, found.rows) == ((), sum(LENGTHS) - 4)
    assert all(layer.wrong == 0 and layer.equal >= 0.95 * found.rows for layer in found.layers)


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_named(plant: str, model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    change, kind = PLANTS[plant]
    if kind == "dense-counted" and len(record.moe_layers) == record.ids[0].shape[1]:
        pytest.skip("the model has no dense layer")
    assert kinds(folder, change(record), tmp_path / "record.safetensors")[0] == kind
