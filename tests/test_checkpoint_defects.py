"""`checkpoint` names each planted defect, by kind, file and tensor, and says nothing of a sound folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import (
    FAMILIES,
    INDEX,
    LAYOUTS,
    QUANTISED,
    T,
    Tensors,
    awq,
    config_of,
    file_of,
    floats,
    fp8_channel,
    fp8_e8m0,
    mxfp4_int8,
    mxfp6,
    quantised,
    write,
)

from moe_conformance.checkpoints.command import judged
from moe_conformance.checkpoints.findings import Finding, Findings
from moe_conformance.checkpoints.folder import Folder
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.model import model_of
from moe_conformance.checkpoints.report import Judgement
from moe_conformance.checkpoints.whole import judge

FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# Of qwen3_moe's nine layers, 1, 5 and 7 have experts: eleven of 24 times 40.
EXPERTS = "model.layers.5.mlp.experts"
UP = f"{EXPERTS}.3.up_proj.weight"
GATE = "model.layers.5.mlp.gate.weight"


def findings(judgement: Judgement) -> list[tuple[str, str]]:
    return [(finding.level, finding.kind) for finding in judgement.findings]


def base(form: str) -> tuple[dict[str, Any], Tensors]:
    """A config and its tensors: of qwen3_moe in floats, in a quantised form, or of another family."""
    if form == "float":
        return config_of("qwen3_moe"), floats("qwen3_moe")
    name, _, layout = form.partition("/")
    if name in QUANTISED:
        return quantised(name, layout or "each")
    return config_of(name), floats(name)


@pytest.mark.parametrize("form", ["hub", "modules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_of_a_sound_folder_of_any_family(family: str, form: Any, tmp_path: Path) -> None:
    if tensors := floats(family, form):
        assert findings(judged(write(tmp_path / "model", config_of(family), tensors))) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", QUANTISED)
def test_nothing_is_said_of_a_sound_folder_in_any_form(form: str, layout: str, tmp_path: Path) -> None:
    assert findings(judged(write(tmp_path / "model", *quantised(form, layout)))) == []


def gpt_oss() -> tuple[dict[str, Any], Tensors]:
    """As published: blocks and scales in place of the experts' weights, which as floats lie transposed."""
    tensors: Tensors = {}
    config = {**config_of("gpt_oss"), "hidden_size": 64, "intermediate_size": 32}
    for name, tensor in floats("gpt_oss", config=config).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            groups = -(-columns // 32)
            tensors[f"{name}_blocks"] = T("U8", (experts, rows, groups, 16))
            tensors[f"{name}_scales"] = T("U8", (experts, rows, groups))
        else:
            tensors[name] = tensor
    return {**config, "quantization_config": {"quant_method": "mxfp4"}}, tensors


def of_mxfp6() -> tuple[dict[str, Any], Tensors]:
    """At sizes that its groups of 32 divide: it is told from mxfp4 by them."""
    config = {**config_of("qwen3_moe"), "hidden_size": 64, "moe_intermediate_size": 32}
    weights = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "mxfp6-pack-quantized"}}
    tensors: Tensors = {}
    for name, tensor in floats("qwen3_moe", config=config).items():
        stem = name.removesuffix(".weight")
        made = mxfp6((), *tensor.shape) if ".experts." in name else {"weight": tensor}
        tensors |= {f"{stem}.{end}": held for end, held in made.items()}
    return {**config, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}, tensors


def of_deepseek_v4() -> tuple[dict[str, Any], Tensors]:
    """As published: e2m1 experts and fp8 shared ones, all with `scale` in e8m0, no prefix, and a draft layer apart."""
    config = {**config_of("deepseek_v4"), "vocab_size": 64, "num_nextn_predict_layers": 1}
    config["quantization_config"] = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    tensors: Tensors = {}
    for name, tensor in floats("deepseek_v4", config=config).items():
        stem, bare = name.removesuffix(".weight"), name.removeprefix("model.")
        if "experts" not in name:
            tensors[bare] = tensor
            continue
        made = mxfp4_int8((), *tensor.shape) if ".experts." in name else fp8_e8m0((), *tensor.shape, 128)
        tensors |= {f"{stem}.{end}".removeprefix("model."): held for end, held in made.items()}
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.8.")}
    return config, tensors | {name.replace("layers.8.", "mtp.0."): tensor for name, tensor in last.items()}


def of_llama4() -> tuple[dict[str, Any], Tensors]:
    """By ModelOpt: packed and transposed as the float ones, a scale a tensor, its name after an underscore."""
    config = {"model_type": "llama4", "text_config": config_of("llama4_text")}
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    tensors = floats("llama4_text", config=config)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[name] = tensors[name]._replace(dtype="F8_E4M3")
        tensors |= {f"{name}_weight_scale": T("F32", ()), f"{name}_input_scale": T("F32", ())}
    return config, tensors


def of_packed_tiles() -> tuple[dict[str, Any], Tensors]:
    """By transformers' own float8 experts: packed, `_scale_inv` after the name."""
    config, tensors = quantised("fp8-block", "packed")
    return config, {
        name.replace("_proj.weight_scale_inv", "_proj_scale_inv").replace("_proj.weight", "_proj"): tensor
        for name, tensor in tensors.items()
    }


def of_transformers_experts(block: int | None, e2m1: bool) -> tuple[dict[str, Any], Tensors]:
    """By transformers' FP8Experts: halves of gate and up with tiles of their own, scales of activations by expert."""
    config = {**config_of("qwen3_moe"), "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    if block:
        config["quantization_config"]["weight_block_size"] = [block, block]
    tensors: Tensors = {}
    for name, tensor in floats("qwen3_moe", "modules").items():
        if not name.endswith("_proj"):
            tensors[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        halves = 2 if "gate_up" in name else 1
        tiles = (halves * -(-rows // halves // block), -(-columns // block)) if block else (halves, 1)
        tensors[name] = T("F8_E4M3", tensor.shape)
        if e2m1:
            tiles = (rows, -(-columns // 32))
            tensors[name] = T("I8", (experts, rows, columns // 2))
        tensors[f"{name}_scale_inv"] = T("F32", (experts, *tiles))
        tensors[f"{name}_activation_scale"] = T("F32", (experts,))
    return config, tensors


def of_split_gpt_oss() -> tuple[dict[str, Any], Tensors]:
    """By llm-compressor: each expert's gate, up and down on their own, with their biases."""
    config = {**config_of("gpt_oss"), "quantization_config": QUANTISED["fp8-channel"][0]}
    tensors: Tensors = {}
    for name, tensor in floats("gpt_oss").items():
        if ".experts." not in name:
            tensors[name] = tensor
    for layer in range(9):
        for expert in range(11):
            for part, rows, columns in (("gate_proj", 24, 40), ("up_proj", 24, 40), ("down_proj", 40, 24)):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                tensors |= {f"{stem}.{end}": held for end, held in fp8_channel((), rows, columns).items()}
                tensors[f"{stem}.bias"] = T("BF16", (rows,))
    return config, tensors


def of_split_dbrx(first: str) -> tuple[dict[str, Any], Tensors]:
    """DBRX, which stacks its experts, split below `first`."""
    config = {**config_of("dbrx"), "quantization_config": QUANTISED["awq"][0]}
    tensors = {name: tensor for name, tensor in floats("dbrx").items() if "router" in name}
    for layer in range(9):
        for expert in range(11):
            for part, rows, columns in (("w1", 24, 40), ("v1", 24, 40), ("w2", 40, 24)):
                stem = f"transformer.blocks.{layer}.ffn.{first}.{expert}.{part}"
                tensors |= {f"{stem}.{end}": held for end, held in awq((), rows, columns).items()}
    return config, tensors


def draft(tensors: Tensors, before: str = "model.layers.9.") -> Tensors:
    """The last layer once more, as one for multi-token prediction."""
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.8.")}
    more = {before + name.removeprefix("model.layers.8."): tensor for name, tensor in last.items()}
    return {**tensors, **more, f"{before}eh_proj.weight": T("BF16", (40, 80))}


def left_as_it_was(tensors: Tensors, *experts: int) -> Tensors:
    """Some experts of layer 5 in floats again."""
    found = {n: t for n, t in tensors.items() if not any(f"layers.5.mlp.experts.{e}." in n for e in experts)}
    plain = floats("qwen3_moe")
    return found | {n: t for n, t in plain.items() if any(f"layers.5.mlp.experts.{e}." in n for e in experts)}


def sound_variants() -> dict[str, tuple[dict[str, Any], Tensors]]:
    plain_config, plain = base("float")
    fp8_config, fp8 = base("fp8-block")
    v3_config, v3 = base("deepseek_v3")
    gptq_config, gptq = quantised("gptq", "each")
    ignore = {**fp8_config["quantization_config"], "ignored_layers": [f"{EXPERTS}.3", f"{EXPERTS}.4"]}
    tower = {f"visual.blocks.0.mlp.{name}.weight": T("BF16", (8, 8)) for name in ("gate_proj", "experts.0.up_proj")}
    attention = {
        "model.layers.0.self_attn.q_proj.weight": T("F8_E4M3", (40, 40)),
        "model.layers.0.self_attn.q_proj.weight_scale_inv": T("F32", (3, 3)),
        "model.embed_tokens.weight": T("BF16", (64, 40)),
    }
    wrapped = {"model_type": "qwen3_vl_moe", "text_config": config_of("qwen3_vl_moe_text")}
    packed = floats("qwen3_vl_moe_text", config=wrapped)
    turned = {
        n: t._replace(shape=(*t.shape[:-2], t.shape[-1], t.shape[-2])) for n, t in packed.items() if "experts" in n
    }
    return {
        "gpt-oss": gpt_oss(),
        "mxfp6": of_mxfp6(),
        "deepseek-v4": of_deepseek_v4(),
        "llama4-modelopt": of_llama4(),
        "packed-tiles": of_packed_tiles(),
        "transformers-tiles": of_transformers_experts(20, e2m1=False),
        "transformers-tensor": of_transformers_experts(None, e2m1=False),
        "transformers-e2m1": of_transformers_experts(128, e2m1=True),
        "gpt-oss-split": of_split_gpt_oss(),
        "dbrx-split": of_split_dbrx("experts"),
        "dbrx-split-below-mlp": of_split_dbrx("experts.mlp"),
        "mixed": ({**fp8_config, "quantization_config": ignore}, left_as_it_was(fp8, 3, 4)),
        "draft-counted": ({**v3_config, "num_nextn_predict_layers": 1}, draft(v3)),
        "draft-not-counted": (v3_config, draft(v3)),
        "draft-apart": (v3_config, draft(v3, "mtp.layers.0.")),
        "draft-left-out": ({**v3_config, "num_nextn_predict_layers": 1}, v3),
        "gptq-in-order": (
            {**gptq_config, "quantization_config": {**gptq_config["quantization_config"], "desc_act": False}},
            {name: entry for name, entry in gptq.items() if not name.endswith("g_idx")},
        ),
        "beside-a-tower": (plain_config, plain | tower),
        "attention-too": (fp8_config, fp8 | attention),
        "multimodal": (wrapped, packed),
        "multimodal-transposed": ({**wrapped, "transformers_version": "4.57.1"}, packed | turned),
        "float-experts-and-input-scales": (
            fp8_config,
            fp8
            | {name.replace("weight_scale_inv", "input_scale"): T("F32", ()) for name in fp8 if "scale_inv" in name},
        ),
    }


@pytest.mark.parametrize("variant", sound_variants())
def test_nothing_is_said_of_what_releases_do(variant: str, tmp_path: Path) -> None:
    assert findings(judged(write(tmp_path / "model", *sound_variants()[variant]))) == []


def test_a_consolidated_file_beside_shards_is_a_note(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", *base("float"))
    (folder / "consolidated.safetensors").write_bytes(file_of({"layers.0.w1": T("BF16", (2, 2))}))
    judgement = judged(folder)
    assert findings(judgement) == [("note", "beside")] and judgement.is_sound


def test_hub_snapshots_are_links_into_the_cache(tmp_path: Path) -> None:
    """models--A--B/snapshots/REVISION/FILE -> ../../blobs/HASH"""
    real = write(tmp_path / "real", *base("float"))
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0a1b", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(real.iterdir()):
        file.rename(blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:040}")
    assert findings(judged(snapshot)) == []


Change = Callable[[dict[str, Any], Tensors], object]


def drop(*parts: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def put(name: str, dtype: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({name: T(dtype, shape)})


def say(**keys: Any) -> Change:
    return lambda config, _: config.update(keys)


def quantisation(**keys: Any) -> Change:
    return lambda config, _: config.update(quantization_config={**config["quantization_config"], **keys})


def rename(old: str, new: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


# Name of the defect: the folder that it is planted in, how, the kind it must be found as, and what must be named.
PLANTED: dict[str, tuple[str, Change, str, str]] = {
    "expert-tensor-missing": ("float", drop(UP), "missing", UP),
    "expert-missing": ("float", drop(f"{EXPERTS}.3."), "missing", f"{EXPERTS}.3.down_proj.weight"),
    "last-experts-missing": ("float", drop(*(f".experts.{e}." for e in (8, 9, 10))), "contradiction", "8 experts"),
    "packed-missing": ("granitemoe", drop("layers.5.block_sparse_moe.output"), "missing", "output_linear"),
    "router-missing": ("float", drop(GATE), "missing", GATE),
    "bias-missing": ("deepseek_v3", drop("layers.8.mlp.gate.e_score"), "missing", "8.mlp.gate.e_score_correction_bias"),
    "shared-missing": ("deepseek_v3", drop("layers.8.mlp.shared_experts.up"), "missing", "shared_experts.up_proj"),
    "layer-missing": ("float", drop("model.layers.5.mlp"), "missing", "model.layers.5"),
    "expert-bias-missing": ("gpt_oss", drop("layers.5.mlp.experts.down_proj_bias"), "missing", "down_proj_bias"),
    "expert-extra": ("float", put(f"{EXPERTS}.40.up_proj.weight", "BF16", 24, 40), "extra", "experts.40"),
    "more-experts": ("float", say(num_experts=10), "contradiction", "11 experts"),
    "unknown-name": ("float", put("model.layers.5.mlp.experts.3.side.weight", "BF16", 2), "extra", "3.side"),
    "layer-beyond": ("float", put("model.layers.9.mlp.experts.0.up_proj.weight", "BF16", 24, 40), "contradiction", "9"),
    "number-with-zeros": ("float", rename(f"{EXPERTS}.3.", f"{EXPERTS}.03."), "extra", "experts.03."),
    "doubled-spelling": ("float", put(f"{EXPERTS}.gate_up_proj", "BF16", 11, 48, 40), "doubled", "gate_up_proj"),
    "doubled-prefix": (
        "float",
        put(UP.replace("model.", "language_model.model."), "BF16", 24, 40),
        "doubled",
        "up_proj",
    ),
    "misshapen": ("float", put(UP, "BF16", 24, 41), "misshapen", UP),
    "transposed": ("float", put(UP, "BF16", 40, 24), "misshapen", "transposed"),
    "router-of-fewer": ("float", put(GATE, "BF16", 10, 40), "router", "10 classes"),
    "router-transposed": ("float", put(GATE, "BF16", 40, 11), "router", "transposed"),
    "bias-of-fewer": ("deepseek_v3", put("model.layers.8.mlp.gate.e_score_correction_bias", "F32", 10), "router", "10"),
    "mistyped": ("float", put(UP, "I32", 24, 40), "mistyped", UP),
    "router-of-integers": ("float", put(GATE, "I64", 11, 40), "mistyped", GATE),
    "table-of-floats": (
        "deepseek_v4",
        put("model.layers.0.ffn.gate.tid2eid", "F32", 129280, 3),
        "mistyped",
        "tid2eid",
    ),
    "wider-in-config": ("float", say(moe_intermediate_size=25), "contradiction", "config.json"),
    "hidden-in-config": ("float", say(hidden_size=48), "contradiction", "config.json"),
    "dense-in-config": ("float", say(mlp_only_layers=[3, 5]), "contradiction", "layer 5 with experts"),
    "sparse-in-config": ("float", say(decoder_sparse_step=1, mlp_only_layers=[]), "missing", "model.layers.0"),
    "dense-in-tensors": (
        "float",
        lambda c, t: (drop("layers.5.mlp")(c, t), put("model.layers.5.mlp.gate_proj.weight", "BF16", 56, 40)(c, t)),
        "contradiction",
        "layers.5.mlp.gate_proj",
    ),
    "layer-with-zeros": ("float", rename("model.layers.5.", "model.layers.05."), "extra", "layers.05."),
    "switched-off": ("cohere2_moe", say(num_shared_experts=0), "contradiction", "switches off"),
    "two-carriers": ("gptq", put(f"{EXPERTS}.3.up_proj.weight_packed", "I32", 24, 5), "doubled", "3.up_proj.qweight"),
    "another-prefix": ("float", rename("model.layers.", "lm.backbone.layers."), "missing", "elsewhere"),
    "no-experts-in-config": ("float", say(num_experts=0), "contradiction", "experts"),
    "config-null": ("float", say(moe_intermediate_size=None), "config", "moe_intermediate_size"),
    "fp8-scale-missing": ("fp8-block", drop(f"{EXPERTS}.3.up_proj.weight_scale_inv"), "scales-missing", "3.up_proj"),
    "fp8-scales-missing": ("fp8-block", drop("weight_scale_inv"), "scales-missing", "weight_scale_inv"),
    "fp8-blocks-wrong": (
        "fp8-block",
        put(f"{EXPERTS}.3.up_proj.weight_scale_inv", "F32", 2, 2),
        "scale-blocks",
        "3.up_proj.weight_scale_inv",
    ),
    "fp8-blocks-of-another-size": (
        "fp8-block",
        quantisation(weight_block_size=[8, 8]),
        "scale-blocks",
        "weight_scale_inv",
    ),
    "fp8-weights-gone": ("fp8-block", lambda _, tensors: tensors.pop(UP), "missing", UP),
    "fp8-scale-of-integers": (
        "fp8-block",
        put(f"{EXPERTS}.3.up_proj.weight_scale_inv", "I32", 2, 3),
        "mistyped",
        "3.up_proj.weight_scale_inv",
    ),
    "fp8-input-scale-missing": (
        "fp8-tensor",
        drop(f"{EXPERTS}.3.up_proj.input_scale"),
        "scales-missing",
        "input_scale",
    ),
    "fp8-channel-scale-short": (
        "fp8-channel",
        put(f"{EXPERTS}.3.up_proj.weight_scale", "BF16", 23, 1),
        "scale-blocks",
        "3.up_proj.weight_scale",
    ),
    "fp8-packed-scale-short": (
        "fp8-block/packed",
        put(f"{EXPERTS}.down_proj.weight_scale_inv", "F32", 10, 3, 2),
        "scale-blocks",
        "down_proj.weight_scale_inv",
    ),
    "one-expert-in-floats": ("fp8-block", lambda c, t: t.update(left_as_it_was(t, 3)), "mistyped", "experts.3."),
    "mxfp4-scale-short": ("mxfp4", put(f"{EXPERTS}.3.up_proj.weight_scale", "U8", 24, 1), "scale-blocks", "3.up_proj"),
    "nvfp4-global-missing": (
        "nvfp4",
        drop(f"{EXPERTS}.3.up_proj.weight_global_scale"),
        "scales-missing",
        "3.up_proj.weight_global_scale",
    ),
    "nvfp4-scale-2-missing": ("nvfp4-modelopt", drop("weight_scale_2"), "scales-missing", "weight_scale_2"),
    "nvfp4-scale-of-bytes": (
        "nvfp4",
        put(f"{EXPERTS}.3.up_proj.weight_scale", "U8", 24, 3),
        "mistyped",
        "3.up_proj.weight_scale",
    ),
    "int4-shape-missing": ("int4", drop(f"{EXPERTS}.3.up_proj.weight_shape"), "missing", "3.up_proj.weight_shape"),
    "int4-codes-short": ("int4", put(f"{EXPERTS}.3.up_proj.weight_packed", "I32", 24, 4), "misshapen", "3.up_proj"),
    "int4-g-idx-missing": (
        "int4",
        lambda config, _: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(actorder="group"),
        "missing",
        "weight_g_idx",
    ),
    "int4-points-missing": (
        "int4-points",
        drop(f"{EXPERTS}.3.up_proj.weight_zero_point"),
        "missing",
        "3.up_proj.weight_zero_point",
    ),
    "int4-points-too-many": (
        "int4",
        put(f"{EXPERTS}.3.up_proj.weight_zero_point", "I32", 3, 5),
        "contradiction",
        "weight_zero_point",
    ),
    "int8-scale-missing": (
        "int8/split",
        drop("layers.1.block_sparse_moe.experts.3.up_proj.weight_scale"),
        "scales-missing",
        "3.up",
    ),
    "gptq-qzeros-missing": ("gptq", drop(f"{EXPERTS}.3.up_proj.qzeros"), "missing", "3.up_proj.qzeros"),
    "gptq-g-idx-missing": ("gptq", drop(f"{EXPERTS}.3.up_proj.g_idx"), "missing", "3.up_proj.g_idx"),
    "gptq-g-idx-short": ("gptq", put(f"{EXPERTS}.3.up_proj.g_idx", "I32", 39), "misshapen", "3.up_proj.g_idx"),
    "gptq-group-size": ("gptq", quantisation(group_size=16), "scale-blocks", "scales"),
    "awq-scales-missing": ("awq", drop(f"{EXPERTS}.3.up_proj.scales"), "scales-missing", "3.up_proj.scales"),
    "nf4-absmax-missing": ("bnb-nf4", drop(f"{EXPERTS}.3.up_proj.weight.absmax"), "scales-missing", "weight.absmax"),
    "nf4-state-missing": ("bnb-nf4", drop(f"{EXPERTS}.3.up_proj.weight.quant_state"), "missing", "quant_state"),
    "bnb-int8-scb-short": ("bnb-int8", put(f"{EXPERTS}.3.up_proj.SCB", "F32", 23), "scale-blocks", "3.up_proj.SCB"),
    "scale-beside-floats": ("float", put(f"{EXPERTS}.3.up_proj.weight_scale", "F32", 1), "extra", "weight_scale"),
    "second-scale": ("fp8-block", put(f"{EXPERTS}.3.up_proj.weight_scale", "F32"), "extra", "3.up_proj.weight_scale"),
    "quantised-without-config": (
        "fp8-block",
        lambda c, _: c.pop("quantization_config"),
        "contradiction",
        "no quantization_config",
    ),
    "another-form-in-config": ("fp8-block", quantisation(quant_method="mxfp4"), "contradiction", "mxfp4"),
    "floats-though-config-says": (
        "float",
        say(quantization_config={"quant_method": "mxfp4"}),
        "contradiction",
        "no tensor in such a form",
    ),
    "quantised-though-left": (
        "fp8-block",
        quantisation(ignored_layers=[f"{EXPERTS}.3.up_proj"]),
        "contradiction",
        "leaves as it was",
    ),
    "attention-scale-missing": (
        "fp8-block",
        put("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", 40, 40),
        "scales-missing",
        "q_proj.weight_scale_inv",
    ),
    "draft-expert-missing": (
        "deepseek_v3",
        lambda c, t: (
            c.update(num_nextn_predict_layers=1),
            t.update(draft(t)),
            drop("layers.9.mlp.experts.3.up")(c, t),
        ),
        "missing",
        "layers.9.mlp.experts.3.up_proj",
    ),
}


def said(finding: Finding) -> str:
    return " ".join((*finding.files, *finding.tensors, finding.got, finding.want, finding.do))


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_named(defect: str, tmp_path: Path) -> None:
    form, change, kind, words = PLANTED[defect]
    config, tensors = base(form)
    assert judged(write(tmp_path / "sound", config, tensors)).is_sound
    change(config, tensors)
    judgement = judged(write(tmp_path / "model", config, tensors))
    found = [finding for finding in judgement.findings if finding.level == "defect"]
    assert any(finding.kind == kind and words in said(finding) for finding in found), found
    assert len(found) <= 4, found


def test_one_expert_in_another_float_is_a_note(tmp_path: Path) -> None:
    """Every reader casts it."""
    config, tensors = base("float")
    judgement = judged(write(tmp_path / "model", config, {**tensors, UP: T("F32", (24, 40))}))
    assert findings(judgement) == [("note", "mistyped")] and judgement.is_sound
    judgement = judged(write(tmp_path / "integers", config, {**tensors, UP: T("I32", (24, 40))}))
    assert set(findings(judgement)) == {("defect", "mistyped")}


Damage = Callable[[Path], object]


def cut(file: str, size: int) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def again_in_the_last(folder: Path) -> None:
    _, tensors = base("float")
    later = dict(list(tensors.items())[len(tensors) // 2 :])
    (folder / LAST).write_bytes(
        file_of({**later, f"{EXPERTS.replace('5', '1')}.0.up_proj.weight": T("BF16", (24, 40))})
    )


DAMAGED: dict[str, tuple[Damage, str, str]] = {
    "truncated": (cut(LAST, 20_000), "truncated", LAST),
    "header-truncated": (cut(LAST, 300), "truncated", LAST),
    "empty": (cut(FIRST, 0), "truncated", FIRST),
    "shard-missing": (lambda folder: (folder / LAST).unlink(), "shard-missing", LAST),
    "bytes-behind": (lambda folder: (folder / LAST).open("ab").write(b"12345678"), "header", "of no tensor"),
    "index-without-name": (index(lambda names: names.pop(UP)), "index", UP),
    "index-with-stranger": (index(lambda names: names.update({UP + "s": FIRST})), "missing", UP + "s"),
    "index-of-another-shard": (index(lambda names: names.update({UP: LAST})), "index", UP),
    "doubled-in-shards": (again_in_the_last, "doubled", f"{FIRST} and in {LAST}"),
    "no-index": (lambda folder: (folder / INDEX).unlink(), "index", INDEX),
    "no-index-shard-missing": (
        lambda folder: ((folder / INDEX).unlink(), (folder / FIRST).unlink()),
        "shard-missing",
        FIRST,
    ),
    "both": (lambda folder: (folder / "model.safetensors").write_bytes(file_of({})), "index", "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_named(damage: str, tmp_path: Path) -> None:
    change, kind, words = DAMAGED[damage]
    folder = write(tmp_path / "model", *base("float"))
    change(folder)
    found = [finding for finding in judged(folder).findings if finding.level == "defect"]
    assert any(finding.kind == kind and words in said(finding) for finding in found), found
    assert len(found) <= 2, found


def test_a_family_without_a_record_has_the_checks_that_hold_for_all(tmp_path: Path) -> None:
    config, tensors = base("float")
    unheard = {"model_type": "unheard_of", **{k: v for k, v in config.items() if k != "model_type"}}
    unheard |= {"scoring_func": "nobody knows"}
    judgement = judged(write(tmp_path / "sound", unheard, tensors))
    assert (findings(judgement), judgement.record) == ([("note", "no-record")], False)
    del tensors[UP]
    tensors[f"{EXPERTS}.4.up_proj.weight"] = T("BF16", (23, 40))
    tensors[f"{EXPERTS}.5.up_proj.weight"] = T("F8_E4M3", (24, 40))
    judgement = judged(write(tmp_path / "model", unheard, tensors))
    found = {finding.kind: finding.tensors for finding in judgement.findings}
    assert found["missing"] == (UP,)
    assert found["misshapen"] == (f"{EXPERTS}.4.up_proj.weight",)
    assert found["mistyped"] == (f"{EXPERTS}.5.up_proj.weight",)
    assert found["scales-missing"] == (f"{EXPERTS}.5.up_proj.weight_scale_inv",)


@pytest.mark.parametrize("method", ["quark", "compressed-tensors"])
def test_a_method_that_is_not_known_is_a_note_and_its_weights_are_let_be(method: str, tmp_path: Path) -> None:
    config, tensors = base("int4")
    groups = {"group_0": {"weights": {"num_bits": 4}, "format": "of-next-year"}}
    config["quantization_config"] = {"quant_method": method, "config_groups": groups}
    del tensors[f"{EXPERTS}.3.up_proj.weight_shape"]
    judgement = judged(write(tmp_path / "model", config, tensors))
    assert findings(judgement) == [("note", "no-form")] and method in judgement.findings[0].got


def test_modelopts_own_file_says_the_form_too(tmp_path: Path) -> None:
    config, tensors = base("nvfp4-modelopt")
    said_beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    alone = {key: value for key, value in config.items() if key != "quantization_config"}
    folder = write(tmp_path / "model", alone, tensors)
    (folder / "hf_quant_config.json").write_text(json.dumps(said_beside))
    assert findings(judged(folder)) == []
    said_beside["quantization"] = {"quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(json.dumps(said_beside))
    assert ("defect", "contradiction") in findings(judged(folder))
    (folder / "config.json").write_text(json.dumps(config))
    assert ("defect", "config") in findings(judged(folder))


def in_memory(config: dict[str, Any], tensors: Tensors) -> list[Finding]:
    """What headers say of a folder that was never written."""
    stored = {name: Stored(name, "x", tensor.dtype, tensor.shape, 0, 0) for name, tensor in tensors.items()}
    folder, found = Folder(Path(), config, None, stored, {}, 0, True), Findings()
    judge(folder, model_of(folder, found), found)
    return [finding for finding in found.all() if finding.level == "defect"]


def last_of_each_kind(tensors: Tensors) -> list[str]:
    """One name for all that differ in their numbers alone."""
    return list({re.sub(r"\d+", "N", name): name for name in tensors}.values())


# Without them the weights are as whole.
OPTIONAL = ("input_global_scale", "g_idx", "weight_format", ".bias")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_any_family_may_be_missing_or_of_another_shape(family: str) -> None:
    config, tensors = config_of(family), floats(family)
    assert in_memory(config, tensors) == []
    identity = [f".experts.{e}." for e in range(11, 17)] if family == "longcat_flash" else []
    for name in last_of_each_kind({n: t for n, t in tensors.items() if not any(part in n for part in identity)}):
        found = in_memory(config, {n: t for n, t in tensors.items() if n != name})
        assert [finding.kind for finding in found] == ["missing"], name
        assert name in found[0].tensors
        shape = tensors[name].shape
        found = in_memory(config, tensors | {name: tensors[name]._replace(shape=(*shape[:-1], shape[-1] + 1))})
        assert [finding.tensors for finding in found] == [(name,)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", QUANTISED)
def test_no_tensor_of_any_form_may_be_missing_or_of_another_shape(form: str, layout: str) -> None:
    config, tensors = quantised(form, layout)
    for name in last_of_each_kind(tensors):
        if name.endswith(OPTIONAL) or (name.endswith("input_scale") and form != "fp8-tensor"):
            continue
        found = in_memory(config, {n: t for n, t in tensors.items() if n != name})
        assert found and any(name in finding.tensors for finding in found), name
        shape = tensors[name].shape
        if shape and "quant_state" not in name:
            found = in_memory(config, tensors | {name: tensors[name]._replace(shape=(*shape[:-1], shape[-1] + 7))})
            assert found and any(name in finding.tensors for finding in found), name
        found = in_memory(config, tensors | {name: tensors[name]._replace(dtype="BOOL")})
        assert found and any(name in finding.tensors for finding in found), name


@pytest.mark.parametrize("variant", sound_variants())
def test_no_tensor_that_releases_have_may_be_missing(variant: str) -> None:
    config, tensors = sound_variants()[variant]
    for name in last_of_each_kind(tensors):
        beside = (
            *OPTIONAL,
            "input_scale",
            "activation_scale",
            "eh_proj.weight",
            "embed_tokens.weight",
            "q_proj.weight",
        )
        if name.endswith(beside) or name.startswith("visual"):
            continue
        found = in_memory(config, {n: t for n, t in tensors.items() if n != name})
        assert found and any(name in finding.tensors for finding in found), name
