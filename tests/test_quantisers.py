"""Checkpoints that a quantiser's own library made: `checkpoint` has nothing to say of them, and they are loaded right.

Each library is asked for where it is installed; the nightly job `quantisers` installs them all.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_conformance.checkpoints.command import judged
from moe_conformance.reference_impl.checkpoint.loading import load

CONFIG = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it, with a tokeniser of fifty words."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**CONFIG)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{at}": at for at in range(50)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="w0", pad_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)
    return folder


def assert_whole(folder: Path) -> None:
    assert judged(folder, values=True).findings == ()


def errors(folder: Path, plain: Path) -> dict[str, float]:
    """By matrix, the largest error beside its largest number."""
    got, want = load(folder), load(plain)
    assert got.keys() == want.keys()
    return {
        name: float((got[name].double() - want[name].double()).abs().max() / want[name].double().abs().max())
        for name in want
    }


# The scheme, what it is exported as, and the largest error: half a step of its codes, or what saturates.
AUTO_ROUND = {
    "int2": ("W2A16", "auto_round", 1 / 2),
    "int3": ("W3A16", "auto_round", 1 / 4),
    "int4": ("W4A16", "auto_round", 1 / 8),
    "int8": ("W8A16", "auto_round", 1 / 128),
    "gptq": ("W4A16", "auto_gptq", 1 / 8),
    "awq": ("W4A16", "auto_awq", 1 / 8),
    "packed": ("W4A16", "auto_round:llm_compressor", 1 / 8),
    "mxfp4": ("MXFP4", "auto_round", 1 / 4),
    "mxfp8": ("MXFP8", "auto_round", 1 / 8),
    "fp8-block": ("FP8_BLOCK", "auto_round", 1 / 16),
    "compressed-mxfp4": ("MXFP4", "llm_compressor", 1 / 4),
    "compressed-int8": ("INT8_W8A8", "llm_compressor", 1 / 128),
}


@pytest.mark.nightly
@pytest.mark.parametrize("form", AUTO_ROUND)
def test_what_auto_round_makes_is_whole(
    form: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it leaves a folder where it works
    auto_round = pytest.importorskip("auto_round", reason="the quantiser's own library")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scheme, export, bound = AUTO_ROUND[form]
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    groups = {"group_size": 32} if "A16" in scheme else {}
    logging.disable(logging.WARNING)
    try:
        made = auto_round.AutoRound(
            model,
            AutoTokenizer.from_pretrained(plain),
            scheme=scheme,
            iters=0,  # no calibration data
            disable_opt_rtn=True,
            device_map="cpu",
            **groups,
        )
        made.quantize_and_save(str(tmp_path), format=export)
    finally:
        logging.disable(logging.NOTSET)
    (folder,) = (file.parent for file in tmp_path.rglob("config.json"))
    assert_whole(folder)
    found = errors(folder, plain)
    experts = {name: error for name, error in found.items() if ".experts." in name}
    assert all(0 < error <= bound for error in experts.values()), experts
    assert all(error == 0 for name, error in found.items() if name not in experts)


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_what_torchao_makes_is_whole(form: str, plain: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the quantiser's own library")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    how = getattr(quantization, form)(version=2)
    experts = {r"re:.*experts\.(gate_up_proj|down_proj)": how}
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=TorchAoConfig(quantization.FqnToConfig(experts)), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    assert_whole(tmp_path)
    got = load(tmp_path)
    for index, layer in enumerate(model.model.layers):
        for name, tensor in (("w13", layer.mlp.experts.gate_up_proj), ("w2", layer.mlp.experts.down_proj)):
            own = tensor.dequantize(torch.float32)
            assert torch.equal(got[f"layers.{index}.experts.{name}"], own), name
    assert max(errors(tmp_path, plain).values()) <= (1 / 16 if form.startswith("Float8") else 1 / 128)


def _four_bits(weight: Tensor, library: Any) -> tuple[dict[str, Tensor], Tensor]:
    codes, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {f"weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
    # Of a float32 weight, so that nothing is rounded.
    return {"weight": codes, **parts}, library.dequantize_4bit(codes, state)


def _eight_bits(weight: Tensor, library: Any) -> tuple[dict[str, Tensor], Tensor]:
    codes, largest, _ = library.int8_vectorwise_quant(weight.half())
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, library.int8_vectorwise_dequant(codes, largest)


@pytest.mark.nightly
@pytest.mark.parametrize(("form", "bound"), [("load_in_4bit", 1 / 5), ("load_in_8bit", 1 / 128)])
def test_what_bitsandbytes_makes_is_whole(form: str, bound: float, plain: Path, tmp_path: Path) -> None:
    """Every expert's matrix by its own functions, as releases made before transformers 5 have them."""
    library = pytest.importorskip("bitsandbytes.functional", reason="the quantiser's own library")
    made: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if ".experts." not in name:
            made[name] = tensor
            continue
        parts, want[name] = (_four_bits if form == "load_in_4bit" else _eight_bits)(tensor.float(), library)
        stem = name.removesuffix("weight")
        made |= {f"{stem}{end}": part.contiguous() for end, part in parts.items()}
    save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    said = {"quant_method": "bitsandbytes", form: True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    assert_whole(tmp_path)
    got = load(tmp_path)
    for index in range(2):
        # Rows of 64: 0.50.2 dequantises shorter ones on a CPU with a wrong block's scale.
        up = [want[f"model.layers.{index}.mlp.experts.{expert}.up_proj.weight"] for expert in range(4)]
        loaded, own = got[f"layers.{index}.experts.w13"][:, 32:], torch.stack(up).float()
        assert (loaded - own).abs().max() <= 2**-20 * own.abs().max()
    assert max(errors(tmp_path, plain).values()) <= bound


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["load_in_4bit", "load_in_8bit"])
def test_what_bitsandbytes_makes_through_transformers_is_whole(form: str, plain: Path, tmp_path: Path) -> None:
    """Of packed experts it quantises none: what is around them alone."""
    pytest.importorskip("bitsandbytes", reason="the quantiser's own library")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(**{form: True})
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_whole(tmp_path)
    assert set(errors(tmp_path, plain).values()) == {0.0}
