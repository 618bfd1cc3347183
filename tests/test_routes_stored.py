"""`moe-conformance routes` on quantised folders: as on the same model with its numbers written out."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from planted_routes import PLANTS, Record, recorded
from safetensors.torch import load_file, save_file

from moe_conformance.errors import CheckpointError
from moe_conformance.routes.command import judged
from moe_conformance.suites.generate.models import whole_model
from moe_conformance.suites.load.forms import FORMS, PACKED_ALONE
from moe_conformance.suites.load.stored import ENCODED

# One of each kind is tried in every run.
CORE = ("fp8-block", "gptq", "nvfp4-modelopt")
SINGLE = [
    form if form in CORE else pytest.param(form, marks=pytest.mark.nightly)
    for form in FORMS
    if form not in PACKED_ALONE
]
LENGTHS = (48, 40, 45, 37)


def folders(path: Path, form: str) -> tuple[Path, Path]:
    """A tiny model whose experts and attention are in the form, and the same as numbers."""
    plain, stored = path / "plain", path / "stored"
    plain.mkdir()
    stored.mkdir()
    whole_model("qwen3-moe").write(plain)
    named, numbers = {}, load_file(plain / "model.safetensors")
    for name, tensor in list(numbers.items()):
        if "_proj.weight" not in name:
            named[name] = numbers[name] = tensor.bfloat16()
            continue
        parts, values = ENCODED[form](tuple(tensor.shape), name)
        # Sizes as they were: of what is drawn, softmax would see one token alone.
        numbers[name] = values.float()
        stem = name.removesuffix("weight")
        named |= {f"{stem}{end}": part for end, part in parts.items()}
    config = {**json.loads((plain / "config.json").read_text()), "dtype": "bfloat16"}
    save_file(numbers, plain / "model.safetensors")
    save_file(named, stored / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    said = dict(FORMS[form][1])
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return plain, stored


def requests() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 50, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("form", SINGLE)
def test_a_quantised_folder_is_judged_as_its_numbers_are(form: str, tmp_path: Path) -> None:
    plain, stored = folders(tmp_path, form)
    record: Record = recorded(plain, requests(), "bfloat16")
    true = record.save(tmp_path / "true.safetensors")
    of_numbers, of_codes = judged(plain, true), judged(stored, true)
    assert [finding for finding in of_codes.findings if finding.level == "defect"] == []
    assert (of_codes.cells, of_codes.layers) == (of_numbers.cells, of_numbers.layers)
    wrong = PLANTS["shifted-by-one"][0](record).save(tmp_path / "wrong.safetensors")
    found = judged(stored, wrong).findings
    assert found[0].kind == "shifted" and found == judged(plain, wrong).findings


def test_a_damaged_quantised_folder_is_one_error(tmp_path: Path) -> None:
    plain, stored = folders(tmp_path, "fp8-block")
    tensors = load_file(stored / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    save_file(tensors, stored / "model.safetensors")
    record = recorded(plain, requests(), "bfloat16").save(tmp_path / "record.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight_scale_inv.* got no such tensor"):
        judged(stored, record)


def test_stored_weights_are_read_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix once in a pass, when its layer is there."""
    from moe_conformance.routes.weights import Quantised

    plain, stored = folders(tmp_path, "fp8-block")
    record = recorded(plain, requests(), "bfloat16").save(tmp_path / "record.safetensors")
    seen: list[int] = []
    real = Quantised.read

    def read(matrix: Quantised, files: object) -> torch.Tensor:
        seen.append(int(matrix.stored["weight"].name.split(".")[2]))
        return real(matrix, files)  # type: ignore[arg-type]

    monkeypatch.setattr(Quantised, "read", read)
    judged(stored, record)
    # Two passes, which wait for each other behind each layer with experts.
    assert [layer for layer, _ in itertools.groupby(seen)] == [0, 1, 0, 1, 2]
    assert Counter(seen) == {0: 2 * 7, 1: 2 * (4 + 3 * 8), 2: 2 * (4 + 3 * 8)}


def _halves(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a quantiser makes of packed experts of GraniteMoE and gpt-oss: by expert, [outputs, inputs] each."""
    stem = name.removesuffix(".weight").rpartition(".")[0].removesuffix(".experts")
    is_bias = name.endswith("_bias")
    end = "bias" if is_bias else "weight"
    for expert, matrix in enumerate(tensor):
        before = f"{stem}.experts.{expert}"
        if "output_linear" in name or "down_proj" in name:
            yield f"{before}.down_proj.{end}", matrix if is_bias or "linear" in name else matrix.T
        elif "input_linear" in name:
            gate, up = matrix.chunk(2)
            yield from ((f"{before}.gate_proj.{end}", gate), (f"{before}.up_proj.{end}", up))
        else:
            turned = matrix if is_bias else matrix.T
            yield from ((f"{before}.gate_proj.{end}", turned[0::2]), (f"{before}.up_proj.{end}", turned[1::2]))


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_packed_experts_that_a_quantiser_split_are_joined(family: str, tmp_path: Path) -> None:
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    tiny_models.build(family).bfloat16().save_pretrained(plain)
    numbers = load_file(plain / "model.safetensors")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in list(numbers.items()):
        if "_linear.weight" not in name and ".experts." not in name:
            named[name] = tensor
            continue
        for part, matrix in _halves(name, tensor):
            if part.endswith("bias"):
                named[part] = matrix.contiguous()
                continue
            scale = matrix.float().abs().amax(1, keepdim=True) / 448
            codes = (matrix.float() / scale).to(torch.float8_e4m3fn)
            named |= {part: codes.contiguous(), f"{part}_scale": scale}
            # A view of the packed tensor, which gets what the codes stand for.
            matrix.copy_(codes.float() * scale)
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    stored.mkdir()
    save_file(named, stored / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    said = dict(FORMS["fp8-channel"][1])
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    record: Record = recorded(plain, requests(), "bfloat16")
    true = record.save(tmp_path / "true.safetensors")
    of_codes, of_numbers = judged(stored, true), judged(plain, true)
    assert of_codes.findings == () and of_codes.layers == of_numbers.layers
    wrong = PLANTS["shifted-by-one"][0](record).save(tmp_path / "wrong.safetensors")
    assert [finding.kind for finding in judged(stored, wrong).findings][:1] == ["shifted"]


@pytest.mark.nightly
def test_packed_experts_without_an_end_of_their_name_are_read(tmp_path: Path) -> None:
    """As transformers saves float8: experts.gate_up_proj and, behind an underscore, experts.gate_up_proj_scale_inv."""
    plain, stored = folders(tmp_path, "fp8-block")
    named = load_file(stored / "model.safetensors")
    each = {name: named.pop(name) for name in list(named) if ".mlp.experts." in name}
    for layer in sorted({name.partition(".mlp.")[0] for name in each}):
        block = f"{layer}.mlp.experts"
        count = sum(name.startswith(block) and name.endswith("up_proj.weight") for name in each)
        for end, written in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            gate, up, down = (
                torch.stack([each[f"{block}.{expert}.{part}_proj.{end}"].view(torch.uint8) for expert in range(count)])
                for part in ("gate", "up", "down")
            )
            dtype = each[f"{block}.0.up_proj.{end}"].dtype
            named[f"{block}.gate_up_proj{written}"] = torch.cat([gate, up], dim=1).view(dtype)
            named[f"{block}.down_proj{written}"] = down.contiguous().view(dtype)
    save_file(named, stored / "model.safetensors", {"format": "pt"})
    record = recorded(plain, requests(), "bfloat16").save(tmp_path / "record.safetensors")
    assert judged(stored, record).layers == judged(plain, record).layers
