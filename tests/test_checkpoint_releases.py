"""`checkpoint` on whole folders as releases and quantisers write them: nothing to say, or that it cannot judge."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import (
    QUANTISED,
    T,
    Tensors,
    awq,
    config_of,
    floats,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    gptq,
    int4,
    nvfp4_modelopt,
    write,
)

from moe_conformance.checkpoints.command import judged

Matrix = Callable[[tuple[int, ...], int, int], Tensors]
# Layers, hidden size, vocabulary.
LAYERS, H, V = 9, 40, 64


def around() -> Tensors:
    """What a model has beside its experts."""
    tensors = {"model.embed_tokens.weight": T("BF16", (V, H)), "lm_head.weight": T("BF16", (V, H))}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        tensors |= {f"{stem}self_attn.{part}_proj.weight": T("BF16", (H, H)) for part in "qkvo"}
        tensors |= {f"{stem}{part}_layernorm.weight": T("BF16", (H,)) for part in ("input", "post_attention")}
    return tensors


def stored(tensors: Tensors, matrix: Matrix, *parts: str) -> Tensors:
    """The matrices whose names have one of these parts, in a form."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        is_meant = name.endswith(".weight") and len(tensor.shape) == 2 and any(part in name for part in parts)
        if not is_meant:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        found |= {f"{name.removesuffix('weight')}{end}": held for end, held in matrix((), rows, columns).items()}
    return found


def every(matrix: Matrix, said: dict[str, Any], family: str = "qwen3_moe") -> tuple[dict[str, Any], Tensors]:
    config = {**config_of(family), "quantization_config": said}
    return config, stored({**around(), **floats(family)}, matrix, "_proj.")


def in_order(columns: int) -> bytes:
    return struct.pack(f"<{columns}i", *(column // 8 for column in range(columns)))


def of_width(bits: int) -> Matrix:
    """GPTQ's, whose codes may reach over the end of a word."""

    def matrix(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
        return {
            "qweight": T("I32", (-(-columns * bits // 32), rows)),
            "qzeros": T("I32", (columns // 8, -(-rows * bits // 32))),
            "scales": T("F16", (columns // 8, rows)),
            "g_idx": T("I32", (columns,), in_order(columns)),
        }

    return matrix


def with_biases(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {**gptq(lead, rows, columns), "bias": T("F16", (rows,))}


def one_group(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "qweight": T("I32", (columns // 8, rows)),
        "qzeros": T("I32", (1, rows // 8)),
        "scales": T("F16", (1, rows)),
        "g_idx": T("I32", (columns,), bytes(4 * columns)),
    }


def act_order(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {**int4(lead, rows, columns), "weight_g_idx": T("I32", (columns,), in_order(columns))}


def one_scale(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    one = T("BF16", (1,))
    return {"weight": T("F8_E4M3", (rows, columns)), "weight_scale": one, "input_scale": one}


def tiles(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("F8_E4M3", (rows, columns)), "weight_scale": T("BF16", (-(-rows // 16), -(-columns // 16)))}


def fbgemm(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    scales = {"weight_scale": T("F32", (rows, 1)), "input_scale_ub": T("F32", (1,))}
    return {"weight": T("F8_E4M3", (rows, columns)), **scales}


def quark_mxfp4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("U8", (rows, columns // 2)), "weight_scale": T("U8", (rows, -(-columns // 32)))}


def modelopt_int4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    """Two outputs a byte."""
    scales = {"weight_scale": T("BF16", (rows, columns // 8)), "pre_quant_scale": T("BF16", (columns,))}
    return {"weight": T("U8", (rows // 2, columns)), **scales}


def modelopt_int8(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    scales = {"weight_scale": T("F32", (rows,)), "pre_quant_scale": T("BF16", (columns,)), "input_scale": T("F32", ())}
    return {"weight": T("I8", (rows, columns)), **scales}


def hqq(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"W_q": T("U8", (rows * columns // 2,)), "scale": T("F16", (rows, 1)), "zero": T("F16", (rows, 1))}


def compressed(kind: str, bits: int, number: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


def modelopt_mixed() -> tuple[dict[str, Any], Tensors]:
    """NVFP4 experts between float8 attention."""
    layers = {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4"}, "model.layers.1.self_attn": {"quant_algo": "FP8"}}
    said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config = {**config_of("qwen3_moe"), "quantization_config": said}
    plain = {**around(), **floats("qwen3_moe")}
    return config, stored(stored(plain, nvfp4_modelopt, ".experts."), fp8_tensor, "self_attn")


def shared_left(said: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Kimi K2's: attention, dense layers and shared experts are left."""
    left = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    config = {**config_of("deepseek_v3"), "quantization_config": {**said, "ignore": left}}
    return config, stored({**around(), **floats("deepseek_v3")}, int4, ".experts.")


def draft_left() -> tuple[dict[str, Any], Tensors]:
    """A draft layer in floats behind layers in tiles of float8."""
    config, tensors = every(fp8_block, QUANTISED["fp8-block"][0], "deepseek_v3")
    last = {n.replace("layers.8.", "layers.9."): t for n, t in floats("deepseek_v3").items() if "layers.8." in n}
    more = {f"model.layers.9.{name}.weight": T("BF16", (H,)) for name in ("enorm", "hnorm", "shared_head.norm")}
    heads = {f"model.layers.9.{name}.weight": T("BF16", (V, H)) for name in ("embed_tokens", "shared_head.head")}
    joined = {"model.layers.9.eh_proj.weight": T("BF16", (H, 2 * H))}
    return {**config, "num_nextn_predict_layers": 1}, {**tensors, **last, **more, **heads, **joined}


def two_groups() -> tuple[dict[str, Any], Tensors]:
    """llm-compressor's: attention in float8, experts in int4."""
    said = compressed("mixed-precision", 4, "int", "group", group_size=8)
    said["config_groups"]["group_0"] |= {"targets": ["re:.*experts.*"], "format": "pack-quantized"}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    said["config_groups"]["group_1"] = {"targets": ["re:.*attn.*"], "weights": weights, "format": "float-quantized"}
    plain = stored({**around(), **floats("qwen3_moe")}, fp8_channel, "self_attn")
    return {**config_of("qwen3_moe"), "quantization_config": said}, stored(plain, int4, ".experts.")


def widths_by_module() -> tuple[dict[str, Any], Tensors]:
    """GPTQModel's `dynamic`: down in eight bits."""
    said = {**QUANTISED["gptq"][0], "dynamic": {"+:.*down_proj.*": {"bits": 8}, "-:.*mlp.gate.*": {}}}
    plain = stored({**around(), **floats("qwen3_moe")}, of_width(8), "down_proj")
    return {**config_of("qwen3_moe"), "quantization_config": said}, stored(plain, gptq, "_proj.")


def cache_alone() -> tuple[dict[str, Any], Tensors]:
    """Nothing is quantised but keys and values."""
    said = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    scales = {f"model.layers.{layer}.self_attn.{part}_scale": T("BF16", (1,)) for layer in range(9) for part in "kv"}
    return {**config_of("qwen3_moe"), "quantization_config": said}, {**around(), **floats("qwen3_moe"), **scales}


def cache_too() -> tuple[dict[str, Any], Tensors]:
    said = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config, tensors = every(fp8_tensor, {**said, "ignore": ["lm_head", "*.mlp.gate"]})
    scales = {f"model.layers.{n}.self_attn.{p}_proj.{p}_scale": T("F32", ()) for n in range(LAYERS) for p in "kv"}
    return config, {**tensors, **scales}


def multimodal() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "qwen3_vl_moe", "text_config": config_of("qwen3_vl_moe_text"), "vision_config": {}}
    tower = {
        "model.visual.patch_embed.proj.weight": T("BF16", (8, 3, 2, 2, 2)),
        "model.visual.blocks.0.mlp.linear_fc1.weight": T("BF16", (24, 8)),
    }
    return config, {**floats("qwen3_vl_moe_text", config=config), **tower}


def old_buffers() -> tuple[dict[str, Any], Tensors]:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": T("F32", (8,)) for layer in range(LAYERS)}
    return config_of("mixtral"), {**around(), **floats("mixtral"), **buffers}


def wide_routers() -> tuple[dict[str, Any], Tensors]:
    tensors = {**around(), **floats("deepseek_v3")}
    return config_of("deepseek_v3"), {n: t._replace(dtype="F32") if "gate." in n else t for n, t in tensors.items()}


def inputs(said: dict[str, Any]) -> dict[str, Any]:
    said["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    return said


def quark(**weight: Any) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, "exclude": ["lm_head"], "export": {}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
_INT4 = compressed("pack-quantized", 4, "int", "group", group_size=8)
RELEASES: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
    "modelopt-fp8-with-cache": cache_too,
    "modelopt-mixed": modelopt_mixed,
    "compressed-cache-alone": cache_alone,
    "compressed-act-order": lambda: every(act_order, compressed("pack-quantized", 4, "int", "group", group_size=8)),
    "compressed-shared-left": lambda: shared_left(_INT4),
    "compressed-two-groups": two_groups,
    "compressed-tiles": lambda: every(
        tiles, compressed("float-quantized", 8, "float", "block", block_structure=[16, 16])
    ),
    "compressed-static": lambda: every(one_scale, inputs(compressed("float-quantized", 8, "float", "tensor"))),
    "gptq-biases": lambda: every(with_biases, {**_GPTQ, "model_file_base_name": "model", "model_name_or_path": None}),
    "gptq-one-group": lambda: every(one_group, {**_GPTQ, "group_size": -1, "desc_act": False}),
    "gptq-three-bits": lambda: every(of_width(3), {**_GPTQ, "bits": 3}),
    "gptq-widths-by-module": widths_by_module,
    "awq-router-left": lambda: every(awq, {**_AWQ, "modules_to_not_convert": ["gate"]}),
    "awq-nulls": lambda: every(awq, {**_AWQ, "modules_to_not_convert": None, "exllama_config": None}),
    "fp8-draft-left": draft_left,
    "fbgemm": lambda: every(fbgemm, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "quark-fp8": lambda: every(fp8_tensor, quark(dtype="fp8_e4m3", qscheme="per_tensor")),
    "quark-mxfp4": lambda: every(quark_mxfp4, quark(dtype="fp4", qscheme="per_group", group_size=32)),
    "multimodal-with-a-tower": multimodal,
    "buffers-of-old": old_buffers,
    "routers-in-float32": wide_routers,
    "float16": lambda: (config_of("mixtral"), floats("mixtral", dtype="F16")),
    "embeddings-tied": lambda: ({**config_of("olmoe"), "tie_word_embeddings": True}, floats("olmoe")),
}
# By methods whose tensors are not known here.
UNJUDGED: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
    "modelopt-int4": lambda: every(modelopt_int4, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}),
    "modelopt-int8": lambda: every(modelopt_int8, {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}),
    "hqq": lambda: every(hqq, {"quant_method": "hqq", "quant_config": {}}),
    "quark-int4": lambda: every(quark_mxfp4, quark(dtype="int4", qscheme="per_group", group_size=32)),
}


@pytest.mark.parametrize("release", RELEASES)
def test_nothing_is_said_of_a_release(release: str, tmp_path: Path) -> None:
    assert judged(write(tmp_path / "model", *RELEASES[release]())).findings == ()


@pytest.mark.parametrize("release", UNJUDGED)
def test_a_release_by_an_unknown_method_is_a_note(release: str, tmp_path: Path) -> None:
    found = judged(write(tmp_path / "model", *UNJUDGED[release]())).findings
    assert [(finding.kind, finding.level) for finding in found] == [("no-form", "note")]
