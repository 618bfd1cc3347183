"""Tiny checkpoint folders of every family and form, made without torch."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_conformance.checkpoints.headers import BITS
from moe_conformance.checkpoints.layout import stored_shape
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.record import Record
from moe_conformance.oracle.naming import Form, entries
from moe_conformance.reference_impl.checkpoint.places import Sizes
from moe_conformance.suites.describe.families import flat_keys

FAMILIES = tuple(name for name, record in RECORDS.items() if record.names is not None)
INDEX = "model.safetensors.index.json"


class T(NamedTuple):
    """A tensor to be written. data: its bytes, or what they are filled with."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


Tensors = dict[str, T]


def file_of(tensors: Mapping[str, T], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, data = 0, []
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.size]}
        at += tensor.size
        # Not zero and no NaN in any dtype; two tensors differ.
        fill = struct.pack("<H", 0x2020 + len(data) % 0xFFF) * (tensor.size // 2 + 1)
        data.append(tensor.data if tensor.data is not None else fill[: tensor.size])
    return raw_file(json.dumps(header, separators=(",", ":")).encode(), b"".join(data))


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, T], shards: int = 2) -> Path:
    """The folder; with more shards than one, an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(file_of(tensors, {"format": "pt"}))
        return folder
    weight_map = {}
    for number in range(shards):
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        (folder / file).write_bytes(file_of({name: tensors[name] for name in own}, {"format": "pt"}))
        weight_map |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def config_of(family: str) -> dict[str, Any]:
    """As a config.json of the level that describes the experts: nine layers, eleven experts, no two sizes alike."""
    record = RECORDS[family]
    return {"model_type": record.model_type, **flat_keys(record)}


def floats(family: str, form: Form = "hub", config: Mapping[str, Any] | None = None, dtype: str = "BF16") -> Tensors:
    """Every tensor of the MoE layers, as the family's published checkpoints name them or its modules are called."""
    record = RECORDS[family]
    found: Tensors = {}
    for entry in entries(record, config or config_of(family), form):
        layer = entry.layer
        shared = layer.spec.shared.count if layer.spec.shared else 1
        sizes = Sizes(layer.spec.num_experts, shared, layer.spec.routing.identity_experts)
        piece = entry.pieces[0]
        shape = stored_shape(piece, layer.tensors[piece.target], sizes, entry.expert is not None)
        kind = "I64" if piece.target.endswith("router.table") else dtype
        found[entry.name] = T(kind, shape)
    return found


def record_of(family: str) -> Record:
    return RECORDS[family]


# The published forms of a matrix [.., rows, columns], written down from what the quantisers' own files hold.
GROUP = 8


def _up(value: int, step: int) -> int:
    return -(-value // step)


def fp8_block(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight": T("F8_E4M3", (*lead, rows, columns)),
        "weight_scale_inv": T("F32", (*lead, _up(rows, 16), _up(columns, 16))),
    }


def fp8_e8m0(lead: tuple[int, ...], rows: int, columns: int, tile: int = 16) -> Tensors:
    return {
        "weight": T("F8_E4M3", (*lead, rows, columns)),
        "scale": T("F8_E8M0", (*lead, _up(rows, tile), _up(columns, tile))),
    }


def fp8_tensor(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight": T("F8_E4M3", (*lead, rows, columns)),
        "weight_scale": T("F32", lead),
        "input_scale": T("F32", lead),
    }


def fp8_channel(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("F8_E4M3", (*lead, rows, columns)), "weight_scale": T("BF16", (*lead, rows, 1))}


def mxfp8(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("F8_E4M3", (*lead, rows, columns)), "weight_scale": T("U8", (*lead, rows, _up(columns, 32)))}


def mxfp6(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": T("U8", (*lead, rows, columns * 3 // 4)),
        "weight_scale": T("U8", (*lead, rows, _up(columns, 32))),
    }


def mxfp4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": T("U8", (*lead, rows, columns // 2)),
        "weight_scale": T("U8", (*lead, rows, _up(columns, 32))),
    }


def mxfp4_int8(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("I8", (*lead, rows, columns // 2)), "scale": T("F8_E8M0", (*lead, rows, _up(columns, 32)))}


def nvfp4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": T("U8", (*lead, rows, columns // 2)),
        "weight_scale": T("F8_E4M3", (*lead, rows, _up(columns, 16))),
        "weight_global_scale": T("F32", (*lead, 1)),
        "input_global_scale": T("F32", (*lead, 1)),
    }


def nvfp4_modelopt(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight": T("U8", (*lead, rows, columns // 2)),
        "weight_scale": T("F8_E4M3", (*lead, rows, _up(columns, 16))),
        "weight_scale_2": T("F32", lead),
        "input_scale": T("F32", lead),
    }


def int4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": T("I32", (*lead, rows, columns // 8)),
        "weight_scale": T("BF16", (*lead, rows, _up(columns, GROUP))),
        "weight_shape": T("I64", (2,), struct.pack("<qq", rows, columns)),
    }


def int4_points(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    points = T("I32", (*lead, _up(rows, 8), _up(columns, GROUP)))
    return {**int4(lead, rows, columns), "weight_zero_point": points}


def int8(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {"weight": T("I8", (*lead, rows, columns)), "weight_scale": T("BF16", (*lead, rows, 1))}


def gptq(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    groups = _up(columns, GROUP)
    index = struct.pack(f"<{columns}i", *(column // GROUP for column in range(columns)))
    return {
        "qweight": T("I32", (*lead, columns // 8, rows)),
        "qzeros": T("I32", (*lead, groups, rows // 8)),
        "scales": T("F16", (*lead, groups, rows)),
        "g_idx": T("I32", (columns,), index),
    }


def awq(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    groups = _up(columns, GROUP)
    return {
        "qweight": T("I32", (*lead, columns, rows // 8)),
        "qzeros": T("I32", (*lead, groups, rows // 8)),
        "scales": T("F16", (*lead, groups, rows)),
    }


def nf4(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    codes = math.prod((*lead, rows, columns))
    blocks = _up(codes, 64)
    return {
        "weight": T("U8", (_up(codes, 2), 1)),
        "weight.absmax": T("U8", (blocks,)),
        "weight.quant_map": T("F32", (16,)),
        "weight.nested_absmax": T("F32", (_up(blocks, 256),)),
        "weight.nested_quant_map": T("F32", (256,)),
        "weight.quant_state.bitsandbytes__nf4": T("U8", (80,)),
    }


def bnb8(lead: tuple[int, ...], rows: int, columns: int) -> Tensors:
    return {
        "weight": T("I8", (*lead, rows, columns)),
        "SCB": T("F32", (*lead, rows)),
        "weight_format": T("U8", ()),
    }


def _group(number: int, kind: str, strategy: str, form: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": number, "type": kind, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


# Form -> its quantization_config, and the tensors of a matrix.
QUANTISED: dict[str, tuple[dict[str, Any], Any]] = {
    "fp8-block": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8_block),
    "fp8-e8m0": ({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}, fp8_e8m0),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fp8-modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor),
    "fp8-channel": (_group(8, "float", "channel", "float-quantized"), fp8_channel),
    "mxfp8": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, mxfp8),
    "mxfp4": (_group(4, "float", "group", "mxfp4-pack-quantized", group_size=32), mxfp4),
    "mxfp4-int8": ({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}, mxfp4_int8),
    "nvfp4": (_group(4, "float", "tensor_group", "nvfp4-pack-quantized", group_size=16), nvfp4),
    "nvfp4-modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4_modelopt),
    "int4": (_group(4, "int", "group", "pack-quantized", group_size=GROUP), int4),
    "int4-points": (_group(4, "int", "group", "pack-quantized", group_size=GROUP, symmetric=False), int4_points),
    "int8": (_group(8, "int", "channel", "int-quantized"), int8),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}, awq),
    "bnb-nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, nf4),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, bnb8),
}
# How experts lie: one by one, packed as the modules are, or packed by the family and split by a quantiser.
LAYOUTS = {"each": ("qwen3_moe", "hub"), "packed": ("qwen3_moe", "modules"), "split": ("granitemoe", "hub")}


def quantised(form: str, layout: str, **sizes: int) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of a model whose experts are in the form. sizes: keys of the config in place of its own."""
    family, spelled = LAYOUTS[layout]
    given, matrix = QUANTISED[form]
    config = {**config_of(family), **sizes}
    if layout == "split":
        config["num_hidden_layers"] = 2
    plain = floats(family, spelled, config)  # type: ignore[arg-type]
    if layout == "split":
        plain = _split(plain)
    found: Tensors = {}
    for name, tensor in plain.items():
        if "router" in name or ".gate.weight" in name:
            found[name] = tensor
            continue
        *lead, rows, columns = tensor.shape
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}."
        found |= {stem + end: held for end, held in matrix(tuple(lead), rows, columns).items()}
    return {**config, "quantization_config": copy.deepcopy(given)}, found


def _split(plain: Tensors) -> Tensors:
    """Packed experts as quantisers split them."""
    found: Tensors = {}
    for name, tensor in plain.items():
        before, _, part = name.rpartition("_linear.weight")[0].rpartition(".")
        if not before:
            found[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        for expert in range(experts):
            stem = f"{before}.experts.{expert}"
            if part == "output":
                found[f"{stem}.down_proj.weight"] = T(tensor.dtype, (rows, columns))
            else:
                half = T(tensor.dtype, (rows // 2, columns))
                found |= {f"{stem}.gate_proj.weight": half, f"{stem}.up_proj.weight": half}
    return found
