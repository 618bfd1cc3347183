"""`moe-conformance routes` on the tiny model of every family: its own routes are accepted, or the family is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from planted_routes import PLANTS, Record, recorded

from moe_conformance.errors import MoEConformanceError
from moe_conformance.model.families.describe import describe
from moe_conformance.routes.command import judged

LENGTHS = (48, 40, 45, 37)
# Families whose models, called with token ids alone, have no routes that can be judged.
REFUSED = {
    "diffusion_gemma_text": "its decoder runs on a canvas of its own length",
    "doge": "no module shows ids",
    "dots3_note_vision_encoder": "it reads images",
    "inkling2_loop_text": "layers run more than once",
    "nllb-moe": "an encoder",
    "qwen3_omni_moe_talker_text": "it reads what the thinker wrote",
    "switch_transformers": "an encoder",
    "zaya": "the router reads the state of the one before",
}
# Those of which the helper that makes records by loading the whole model makes none.
NO_RECORD = {
    "ernie4_5_vl_moe_text": "two blocks a layer",
    "llama4_text": "the wrapper of 5.24 raises on text alone",
}
# Whose text model alone has routes, though the whole has none; or one that counts layers otherwise than the others.
PLANTED = {"llama4_text": True, "longcat_flash": False}


def invented(folder: Path, requests: list[list[int]]) -> Record:
    """Of the right shape, for a model that does not run."""
    spec = describe(json.loads((folder / "config.json").read_text()))
    ids = tuple(np.zeros((len(tokens) - 1, spec.num_layers, spec.max_top_k), np.int32) for tokens in requests)
    return Record(tuple(map(np.array, requests)), ids, spec.max_experts, spec.moe_layers)


@pytest.mark.nightly
@pytest.mark.sweep
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_familys_own_routes_in_bfloat16_are_accepted(family: str, tmp_path: Path) -> None:
    import torch

    model = tiny_models.build.__wrapped__(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    requests = [rng.integers(3, 64, length).tolist() for length in LENGTHS]
    path = tmp_path / "record.safetensors"
    if family in REFUSED | NO_RECORD:
        try:
            judged(tmp_path, invented(tmp_path, requests).save(path), dtype="bfloat16")
        except MoEConformanceError:
            return
        assert family in NO_RECORD
        return
    found = judged(tmp_path, recorded(tmp_path, requests, "bfloat16").save(path), dtype="bfloat16")
    assert found.findings == (), found.outcome


@pytest.mark.nightly
@pytest.mark.sweep
@pytest.mark.parametrize("family", PLANTED)
def test_routes_of_families_that_are_built_otherwise_are_judged(family: str, tmp_path: Path) -> None:
    """Their own accepted, and each plant that their layers allow named."""
    import torch

    model = tiny_models.build.__wrapped__(family, text_only=PLANTED[family])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data.zero_()  # which would choose the same experts for almost every token
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    record = recorded(tmp_path, [rng.integers(3, 64, length).tolist() for length in LENGTHS], "bfloat16")
    path = tmp_path / "record.safetensors"
    found = judged(tmp_path, record.save(path), dtype="bfloat16")
    assert found.findings == (), found.outcome
    for plant, (change, kind) in PLANTS.items():
        if plant != "dense-layers-counted":  # of which they have none
            found = judged(tmp_path, change(record).save(path), dtype="bfloat16")
            assert kind in [finding.kind for finding in found.findings], plant
