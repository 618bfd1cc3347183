"""vLLM's functional entry with stored weights: codes, scales and zero points as its quantisation methods give them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, QuantSpec
from moe_conformance.errors import Absent, Unsupported

# Rows of BLOCK_SIZE_K that the kernel of groups reads beyond a matrix, without a mask, before it multiplies them by 0.
_BEYOND = 4096


def formats() -> frozenset[str]:
    """Formats that the functional entry, or vLLM's own dequantisation before it, takes."""
    names = {"fp8_e4m3", "int8", "int4", "nvfp4"}
    return frozenset({f"quantised:{name}" for name in names} | {"quantised_activations"})


def stored(inputs: ExpertsInputs) -> tuple[Tensor, Tensor, Any, str]:
    """w13 or w1, w2, the config of the call, and what dequantised them, if anything did.

    Raises Unsupported for the forms that it has no kernel for.
    """
    quant, tensors = inputs.quant, inputs.tensors
    assert quant is not None
    first = "w13" if inputs.mlp.gated else "w1"
    names = (f"experts.{first}", "experts.w2")
    biases = {"w1_bias": tensors.get(f"experts.b{first[1:]}"), "w2_bias": tensors.get("experts.b2")}
    if quant.format == "nvfp4":
        w1, w2 = (_dequantised(inputs, quant, name) for name in names)
        return w1, w2, _config("biased_moe_quant_config")(*biases.values()), "dequantize_to_dtype"
    match quant.format, quant.granularity, quant.activations:
        case "fp8_e4m3", "tensor", "static" if not quant.split_gate_up:
            make, arguments = "fp8_w8a8_moe_quant_config", _static(inputs, names)
        case "fp8_e4m3", "channel", "token":
            make, arguments = "fp8_w8a8_moe_quant_config", {"per_act_token_quant": True, "per_out_ch_quant": True}
        case "fp8_e4m3", "block", "group" if quant.group == quant.block[1]:
            _whole_groups(inputs, quant)
            if inputs.mlp.gated and not quant.split_gate_up and inputs.mlp.width % quant.block[0]:
                raise Unsupported("vLLM: tiles of gate and up are of one of them each, and begin at its first row")
            make, arguments = "fp8_w8a8_moe_quant_config", {"block_shape": list(quant.block)}
        case "int8", "channel", "token" if not quant.zero_points:
            make, arguments = "int8_w8a8_moe_quant_config", {"per_act_token_quant": True}
            arguments |= {"a1_scale": None, "a2_scale": None}
        case "int8", "channel", "no" if not quant.zero_points:
            make, arguments = "int8_w8a16_moe_quant_config", dict.fromkeys(("w1_zp", "w2_zp"))
        case "int8" | "int4", "group", "no":
            if inputs.mlp.bias:
                raise Unsupported("vLLM's fused_experts: the kernel for groups asserts that there is no bias")
            make = f"{quant.format}_w{quant.format[3:]}a16_moe_quant_config"
            arguments = {"block_shape": [0, quant.group], "w1_zp": None, "w2_zp": None}
        case _:
            raise Unsupported(
                f"vLLM's fused_experts: got {quant.format} by {quant.granularity} with activations "
                f"{quant.activations!r}, which no quantisation method of its Triton experts has"
            )
    for number, name in enumerate(names, 1):
        scale = tensors[f"{name}.scale"]
        arguments[f"w{number}_scale"] = scale[..., None] if quant.granularity == "channel" else scale
        if quant.zero_points:
            arguments[f"w{number}_zp"] = _zero_points(tensors[f"{name}.zero_point"], quant)
    w1, w2 = (_codes(tensors[name], quant) for name in names)
    make_config = _config(make)
    arguments |= biases if inputs.mlp.bias else {}
    if absent := arguments.keys() - inspect.signature(make_config).parameters.keys():
        raise Unsupported(f"vLLM: {make} of this release has no argument {', '.join(sorted(absent))}")
    return w1, w2, make_config(**arguments), ""


def _config(name: str) -> Any:
    from vllm.model_executor.layers.fused_moe import config

    return getattr(config, name)


def _static(inputs: ExpertsInputs, names: tuple[str, str]) -> dict[str, Any]:
    given = [inputs.tensors[f"{name}.input_scale"] for name in names]
    if any(bool((scale != scale[0]).any()) for scale in given):
        raise Unsupported("vLLM's fused_experts: all experts share one scale of activations, the largest")
    return {f"a{number}_scale": scale[:1] for number, scale in enumerate(given, 1)}


def _whole_groups(inputs: ExpertsInputs, quant: QuantSpec) -> None:
    """vLLM asserts it of activations that it quantises by group."""
    for width in (inputs.x.shape[-1], inputs.mlp.width):
        if width % quant.group:
            raise Unsupported(f"vLLM: got {width} columns, want a multiple of {quant.group}, a group of activations")


def _codes(codes: Tensor, quant: QuantSpec) -> Tensor:
    """As its kernels of groups want them: unsigned, the even column in the low bits; memory behind them is readable."""
    if quant.granularity == "group":
        if quant.format == "int8":
            codes = (codes.short() + 128).to(torch.uint8)
        elif not quant.zero_points:
            codes = codes ^ 0x88
    room = torch.zeros(codes.numel() + _BEYOND, dtype=torch.uint8)
    found = room[: codes.numel()].view(codes.dtype).view(codes.shape)
    return found.copy_(codes)


def _zero_points(zeros: Tensor, quant: QuantSpec) -> Tensor:
    """Of int4 two rows a byte, the even one in the low bits."""
    if quant.format == "int8":
        return (zeros.short() + 128).to(torch.uint8)
    if zeros.shape[1] % 2:
        raise Unsupported(f"vLLM: got {zeros.shape[1]} rows, want an even number; two zero points share a byte")
    return zeros[:, 0::2] | zeros[:, 1::2] << 4


def _dequantised(inputs: ExpertsInputs, quant: QuantSpec, name: str) -> Tensor:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    codes, columns = inputs.tensors[name], inputs.mlp.width if name.endswith("w2") else inputs.x.shape[-1]
    scale, whole = inputs.tensors[f"{name}.scale"], inputs.tensors[f"{name}.global_scale"]
    if columns % quant.group:
        raise Unsupported(f"vLLM: got {columns} columns, want a multiple of {quant.group}, a group of NVFP4")
    if whole.dim() > 1:
        raise Absent("vLLM: gate and up share one global scale")
    if "swizzle" not in inspect.signature(dequantize_to_dtype).parameters:
        raise Unsupported("vLLM: this release's dequantize_to_dtype takes scales in the order of tensor cores alone")
    found: Tensor = dequantize_to_dtype(codes, scale, whole, inputs.x.dtype, quant.group, swizzle=False)
    return found
