"""`moe-conformance routes`: true records are accepted, and what is wrong with others is named."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from planted_routes import PLANTS, Record, recorded

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import read_folder
from moe_conformance.routes import layerwise
from moe_conformance.routes.command import judged
from moe_conformance.suites.generate.models import whole_model

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


# What vLLM 0.32.0 returned of the whole model qwen3-moe (tools/record_routes.py), as it is and with each plant.
RUNS = sorted((Path(__file__).parent / "recorded").glob("vllm-*.jsonl"))


@pytest.fixture(scope="module", params=RUNS, ids=lambda file: file.stem)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path, str, Record]]:
    """The model's folder, the record of the run, its dtype, and what it says."""
    name, _, dtype = request.param.stem.split("-", 2)[2].rpartition("-")
    whole = whole_model(name)
    answers = [json.loads(line) for line in request.param.read_text().splitlines()]
    tokens = tuple(np.array(said["prompt_token_ids"] + said["token_ids"]) for said in answers)
    ids = tuple(np.array(said["routed_experts"]) for said in answers)
    with tempfile.TemporaryDirectory() as folder:
        whole.write(Path(folder))
        yield Path(folder), request.param, dtype, Record(tokens, ids, whole.experts, tuple(whole.moe_layers))


def test_a_run_of_vllm_is_accepted(run: tuple[Path, Path, str, Record]) -> None:
    folder, file, dtype, record = run
    found = judged(folder, file, dtype=dtype)
    assert (found.findings, found.rows) == ((), sum(map(len, record.ids)))


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_in_a_run_of_vllm_is_named(
    plant: str, run: tuple[Path, Path, str, Record], tmp_path: Path
) -> None:
    folder, _, dtype, record = run
    change, kind = PLANTS[plant]
    found = judged(folder, change(record).save(tmp_path / "record.safetensors"), dtype=dtype)
    assert found.findings[0].kind == kind


@pytest.mark.nightly
@pytest.mark.parametrize("plant", [None, "shifted-by-one", "stale", "physical-ids"])
def test_ten_thousand_rows_are_judged_in_two_minutes(plant: str | None, tmp_path: Path) -> None:
    tiny_models.build("qwen3_moe").save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    record = recorded(tmp_path, [rng.integers(0, 64, length).tolist() for length in [2501] * 4 + [40]])
    if plant:
        record = PLANTS[plant][0](record)
    file = record.save(tmp_path / "record.safetensors")
    began = time.process_time()
    found = judged(tmp_path, file)
    assert time.process_time() - began < 120 and found.rows > 10_000
    assert [finding.kind for finding in found.findings][:1] == ([PLANTS[plant][1]] if plant else [])


def test_one_layer_is_in_memory_at_a_time(model: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the language model's head never is."""
    folder, record = model
    there: list[set[str]] = []
    real = layerwise._Walks._observed

    def observed(self: Any, layer: int, block: Any) -> Any:
        found = real(self, layer, block)
        loaded = {name for name, tensor in self.model.model.named_parameters() if not tensor.is_meta}
        there.append({name.split(".")[2] if ".layers." in name else name for name in loaded})
        return found

    monkeypatch.setattr(layerwise._Walks, "_observed", observed)
    config = json.loads((folder / "config.json").read_text())
    stored = read_folder(folder, Findings()).tensors
    whole = layerwise.Model(folder, config, stored, torch.float32, wider=False)
    assert len(list(whole.run([tokens.tolist() for tokens in record.tokens]))) == len(record.moe_layers)
    assert there == [{"model.embed_tokens.weight", str(layer)} for layer in record.moe_layers]
    assert all(tensor.is_meta for name, tensor in whole.model.named_parameters() if ".layers." in name)
