"""float8 weights as `QuantSpec` stores them, and what they are exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec, QuantSpec
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8


def stored_and_exact(
    quant: QuantSpec, mlp: MLPSpec, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Codes and scales of both matrices in the shapes of `QuantSpec.tensors`, and their values in float64."""
    stored, exact = {}, {}
    for part in ("w13" if mlp.gated else "w1", "w2"):
        name = f"experts.{part}"
        halves = 2 if quant.split_gate_up and part == "w13" else 1
        tile = {"tensor": (0, 0), "channel": (1, 0), "block": quant.block, "group": (1, quant.group)}[quant.granularity]
        codes, scale = quantise_fp8(tensors[name], tile=tile, stacked=halves)
        stored[name], exact[name] = codes, dequantise_fp8(codes, scale, tile=tile, stacked=halves, dtype=torch.float64)
        _, hidden, _ = tensors["experts.w2"].shape
        wanted = quant.tensors("experts", mlp, hidden, (len(codes),))[f"{name}.scale"]
        stored[f"{name}.scale"] = scale.reshape(wanted)
    return stored, exact
