"""Stored weights as transformers reads them where it computes with plain ones: its own dequantisation, on load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_conformance.engine import ExpertsInputs, QuantSpec
from moe_conformance.errors import Unsupported
from moe_conformance.model.specs import Shape


def formats() -> frozenset[str]:
    """Formats that the installed release dequantises, by its own functions for them."""
    found = set()
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: F401

        found.add("quantised:fp8_e4m3")
    except ImportError:
        pass
    try:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: F401

        found.add("quantised:mxfp4")
    except ImportError:
        pass
    return frozenset(found)


def loaded_as_numbers(folder: Path) -> dict[str, Any]:
    """What from_pretrained is told, beside the folder, so that it dequantises on load; nothing for plain weights.

    Raises Unsupported where it keeps weights as they are stored, or asks for a quantiser's library.
    """
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    said = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if said is None:
        return {}
    match said.get("quant_method"):
        case "mxfp4":
            return {"quantization_config": Mxfp4Config(dequantize=True)}
        case "fp8":
            if find_spec("accelerate") is None:
                raise Unsupported("load: transformers reads fp8 with accelerate, which is not installed")
            tile = tuple(said.get("weight_block_size") or (128, 128))
            return {"quantization_config": FineGrainedFP8Config(dequantize=True, weight_block_size=tile)}
        case method:
            raise Unsupported(f"load: transformers reads {method} by the quantiser's own library, and keeps its codes")


def dequantised(inputs: ExpertsInputs, quant: QuantSpec) -> Mapping[str, Tensor]:
    """The tensors of the experts in x's dtype. Raises Unsupported for what no such function reads."""
    if quant.activations != "no":
        raise Unsupported("experts: transformers quantises activations on a GPU alone")
    found = {}
    for name, shape in inputs.mlp.tensors("experts", inputs.x.shape[-1]).items():
        if len(shape) == 1:
            found[name] = inputs.tensors[name]
            continue
        match quant.format:
            case "mxfp4":
                found[name] = _mxfp4(inputs, name, shape[1])
            case "fp8_e4m3":
                halves = 2 if quant.split_gate_up and inputs.mlp.gated and name != "experts.w2" else 1
                found[name] = _fp8(inputs, quant, name, shape, halves)
            case _:
                raise Unsupported(
                    f"experts: transformers has no function that reads {quant.format} without its library"
                )
    return found


def _mxfp4(inputs: ExpertsInputs, name: str, columns: int) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if columns % 32:
        raise Unsupported(f"experts: got {columns} columns, want a multiple of 32, as transformers takes whole blocks")
    blocks: Tensor = inputs.tensors[name].unflatten(-1, (-1, 16))
    plain: Tensor = convert_moe_packed_tensors(blocks, inputs.tensors[f"{name}.scale"], dtype=inputs.x.dtype)
    return plain.mT.contiguous()


def _fp8(inputs: ExpertsInputs, quant: QuantSpec, name: str, shape: Shape, halves: int) -> Tensor:
    """Expert by expert, and gate and up each by itself, as checkpoints have them."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = shape[0] // halves, shape[1]
    tile = {"tensor": (rows, columns), "channel": (1, columns), "block": quant.block, "group": (1, quant.group)}
    high, wide = tile[quant.granularity]
    if rows % high or columns % wide:
        raise Unsupported(
            f"experts: got {rows} x {columns}, want multiples of {high} x {wide}; transformers cuts no tile"
        )
    codes = inputs.tensors[name].unflatten(1, (halves, rows)).flatten(0, 1)  # [E halves, rows, columns]
    scales = inputs.tensors[f"{name}.scale"].reshape(len(codes), rows // high, columns // wide)
    given = {"weight": list(codes), "weight_scale_inv": list(scales)}
    # Under the name "weight" alone, the first of a list is taken.
    convert: Any = Fp8Dequantize(None)  # type: ignore[no-untyped-call]
    plain = convert.convert({f"experts.{name}": tensors for name, tensors in given.items()})
    whole: Tensor = torch.stack(plain["experts.weight"]).unflatten(0, (-1, halves)).flatten(1, 2)
    return whole.to(inputs.x.dtype)
