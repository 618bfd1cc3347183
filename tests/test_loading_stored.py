"""Quantised checkpoints: the forms of releases, what is refused, and what compressed-tensors itself makes of a form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.errors import CheckpointError
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.reference_impl.checkpoint.loading import load
from moe_conformance.suites.load.cases import STORED
from moe_conformance.suites.load.forms import FORMS
from moe_conformance.suites.load.stored import E2M1, ENCODED, write


def case_of(form: str, layout: str = "by-expert") -> Case:
    return next(case for case in STORED if case.id == f"load-stored-{form}-{layout}")


def written(folder: Path, form: str) -> None:
    write(folder, case_of(form).recipe)


def change(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        named = load_file(file)
        change(named)
        save_file(named, file)
    names = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


# compressed-tensors 0.20 has no act-order by groups any more; what older releases stored so remains.
REMOVED = ("int4-packed-order",)


@pytest.mark.parametrize(
    "form", [f for f in FORMS if FORMS[f][1]["quant_method"] == "compressed-tensors" and f not in REMOVED]
)
def test_compressed_tensors_reads_the_same_numbers(form: str) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.base", reason="the quantiser's own library")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    said = FORMS[form][1]
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**said["config_groups"]["group_0"]["weights"]),
        format=said["format"],
    )
    parts, numbers = ENCODED[form]((32, 64), form)
    own = library.BaseCompressor.get_value_from_registry(said["format"]).decompress(dict(parts), scheme)["weight"]
    assert (own.double() - numbers).abs().max() <= 4 * torch.finfo(own.dtype).eps * numbers.abs().max()


def test_a_layer_with_an_expert_left_as_it_was_has_numbers_alone(tmp_path: Path) -> None:
    write(tmp_path, next(case for case in STORED if case["left"]).recipe)
    assert load(tmp_path).stored == {}


def test_deepseek_v4_has_fp4_experts_beside_an_fp8_shared_one(tmp_path: Path) -> None:
    """Two e2m1 a byte of int8, scales in e8m0 under the name `scale`; tiles of the shared expert are cut at 24 rows."""
    config = {
        "model_type": "deepseek_v4",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_hash_layers": 0,
        "moe_intermediate_size": 24,
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    }
    named: dict[str, Tensor] = {
        "layers.0.ffn.gate.weight": normal((2, 64), "gate"),
        "layers.0.ffn.gate.bias": normal((2,), "bias"),
    }
    want: dict[str, Tensor] = {}
    for part, (rows, columns) in {"w1": (24, 64), "w3": (24, 64), "w2": (64, 24)}.items():
        for expert in range(2):
            stem = f"layers.0.ffn.experts.{expert}.{part}"
            codes = integers((rows, columns), stem, 16)
            byte = integers((rows, -(-columns // 32)), f"{stem} scale", 130, 120).to(torch.uint8)
            named[f"{stem}.weight"] = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
            named[f"{stem}.scale"] = byte.view(torch.float8_e8m0fnu)
            spread = torch.exp2(byte.double() - 127).repeat_interleave(32, 1)[:, :columns]
            want[f"{part} {expert}"] = torch.tensor(E2M1, dtype=torch.float64)[codes] * spread
        stem = f"layers.0.ffn.shared_experts.{part}"
        named[f"{stem}.weight"] = normal((rows, columns), stem, std=16.0).to(torch.float8_e4m3fn)
        named[f"{stem}.scale"] = torch.full((1, 1), 120 + len(want), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        want[part] = named[f"{stem}.weight"].double() * 2.0 ** (len(want) - 8 + 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(named, tmp_path / "model.safetensors")
    got = load(tmp_path)
    for expert in range(2):
        both = torch.cat([want[f"w1 {expert}"], want[f"w3 {expert}"]])
        assert torch.equal(got["layers.0.experts.w13"][expert].double(), both)
        assert torch.equal(got["layers.0.experts.w2"][expert].double(), want[f"w2 {expert}"])
    assert torch.equal(got["layers.0.shared.w2"].double(), want["w2"])


def test_a_scale_of_no_dim_beside_one_of_one_is_the_same_scale(tmp_path: Path) -> None:
    written(tmp_path, "nvfp4-modelopt")
    before = load(tmp_path)

    def reshape(named: dict[str, Tensor]) -> None:
        named |= {
            n: t.reshape(1)
            for n, t in named.items()
            if n.endswith(("up_proj.input_scale", "1.down_proj.weight_scale_2"))
        }

    change(tmp_path, reshape)
    after = load(tmp_path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("form", "end"),
    [
        ("fp8-block", "weight_scale_inv"),
        ("fp8-channel", "weight_scale"),
        ("int4-packed", "weight_scale"),
        ("int4-packed-zero", "weight_zero_point"),
        ("nvfp4", "weight_global_scale"),
        ("nvfp4-modelopt", "weight_scale_2"),
        ("gptq", "qzeros"),
        ("awq", "scales"),
    ],
)
def test_a_missing_companion_is_named(tmp_path: Path, form: str, end: str) -> None:
    written(tmp_path, form)
    name = f"model.layers.0.mlp.experts.1.up_proj.{end}"
    change(tmp_path, lambda named: named.pop(name, None))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(tmp_path)


def test_fp8_weights_without_any_scale_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "fp8-block")

    def strip(named: dict[str, Tensor]) -> None:
        for name in [name for name in named if name.endswith("scale_inv")]:
            del named[name]

    change(tmp_path, strip)
    with pytest.raises(CheckpointError, match="weight_scale_inv"):
        load(tmp_path)


def test_gate_and_up_of_unequal_tiles_have_their_own(tmp_path: Path) -> None:
    """24 rows of tiles of 16: the second tile of gate has 8, and up begins anew."""
    written(tmp_path, "fp8-block")
    config = json.loads((tmp_path / "config.json").read_text()) | {"moe_intermediate_size": 24, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {"model.layers.0.mlp.gate.weight": normal((4, 64), "gate")}
    want = {}
    for expert in range(4):
        for part, shape in {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}.items():
            parts, numbers = ENCODED["fp8-block"](shape, f"{expert} {part}")
            stem = f"model.layers.0.mlp.experts.{expert}.{part}"
            named |= {f"{stem}.{end}": tensor for end, tensor in parts.items()}
            want[expert, part] = numbers
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file(named, tmp_path / "model.safetensors")
    got = load(tmp_path)["layers.0.experts.w13"]
    for expert in range(4):
        both = torch.cat([want[expert, "gate_proj"], want[expert, "up_proj"]])
        assert torch.equal(got[expert].double(), both)


@pytest.mark.parametrize("state", [b"[", b"3", b'{"blocksize": "wide"}', b'{"blocksize": 0}', b"\xff"])
def test_a_state_of_bitsandbytes_that_says_nonsense_is_refused(tmp_path: Path, state: bytes) -> None:
    written(tmp_path, "bnb-nf4")
    wrong = torch.tensor(list(state), dtype=torch.uint8)
    end = "quant_state.bitsandbytes__nf4"
    change(tmp_path, lambda named: named.update({name: wrong.clone() for name in named if name.endswith(end)}))
    with pytest.raises(CheckpointError, match=r"bnb4 weights: .*; mend the export"):
        load(tmp_path)


def test_what_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    written(tmp_path, "fp8-channel")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "squeezed"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="got squeezed, want a method whose form is known"):
        load(tmp_path)
