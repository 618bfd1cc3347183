"""How experts' weights may be stored and adapted: quantised formats and LoRA, as data. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_conformance.model.specs import MLPSpec, Shape

Format = Literal["fp8_e4m3", "int8", "int4", "mxfp4", "nvfp4"]
Granularity = Literal["tensor", "channel", "block", "group"]

# Weights in one byte of these formats.
PER_BYTE = {"fp8_e4m3": 1, "int8": 1, "int4": 2, "mxfp4": 2, "nvfp4": 2}


@dataclass(frozen=True)
class QuantSpec:
    """How the matrices of experts are stored, and in what form activations meet them.

    format: of one weight. "fp8_e4m3" is float8_e4m3fn, "int8" is int8; "int4", "mxfp4" and "nvfp4" are two a byte
    (uint8), the even column in the low four bits; the latter two are e2m1 (OCP Microscaling Formats 1.0).
    granularity: of the scales, float32. "tensor": one a matrix; "channel": one a row; "block": one a tile of `block`
    rows and columns; "group": one for `group` columns of a row, for "mxfp4" (32) in e8m0 as uint8, for "nvfp4" (16) in
    float8_e4m3fn beside one float32 scale a matrix. Tiles and groups at the ends may be cut.
    split_gate_up: gate and up have each what a matrix has, a scale, tiles that begin at its own first row, or a global
    scale; otherwise w13 is one matrix.
    zero_points: a weight is (code - zero point) times scale, and 4-bit codes are 0 to 15; without them integer codes
    are symmetric around 0, those of 4 bits in two's complement.
    activations: "no", weights are dequantised; "token" or "group", x and what enters w2 are quantised by a scale for
    each row, or each row and `group` columns, that the engine computes; "static", by a scale that is given.
    """

    format: Format
    granularity: Granularity
    block: tuple[int, int] = (128, 128)
    group: int = 0
    split_gate_up: bool = False
    zero_points: bool = False
    activations: Literal["no", "token", "group", "static"] = "no"

    def tensors(self, prefix: str, mlp: MLPSpec, hidden: int, lead: Shape = ()) -> dict[str, Shape]:
        """Names and shapes of what lies in memory in place of `MLPSpec.tensors`, biases included as they are.

        For each matrix NAME [.., rows, columns]: NAME, the codes; NAME.scale; NAME.zero_point, in the shape of the
        scales; NAME.global_scale [..] for "nvfp4"; NAME.input_scale [..] for static activations.
        """
        found: dict[str, Shape] = {}
        for name, shape in mlp.tensors(prefix, hidden, lead).items():
            if not name.rpartition(".")[2].startswith("w"):
                found[name] = shape
                continue
            rows, columns = shape[-2:]
            parts = 2 if self.split_gate_up and mlp.gated and not name.endswith(".w2") else 1
            whole = (*lead, 2) if parts == 2 else lead
            scale: Shape
            match self.granularity:
                case "tensor":
                    scale = whole
                case "channel":
                    scale = (*lead, rows)
                case "block":
                    scale = (*lead, parts * -(-rows // parts // self.block[0]), -(-columns // self.block[1]))
                case "group":
                    scale = (*lead, rows, -(-columns // self.group))
            found |= {name: (*lead, rows, -(-columns // PER_BYTE[self.format])), f"{name}.scale": scale}
            if self.zero_points:
                found[f"{name}.zero_point"] = scale
            if self.format == "nvfp4":
                found[f"{name}.global_scale"] = whole
            if self.activations == "static":
                found[f"{name}.input_scale"] = lead
        return found


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters of all experts: y = W x + alpha / rank * B (A x) (https://arxiv.org/abs/2106.09685).

    adapters: how many lie side by side. rslora: alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732).
    """

    adapters: int
    rank: int
    alpha: float
    rslora: bool = False

    def tensors(self, mlp: MLPSpec, hidden: int, experts: int) -> dict[str, Shape]:
        """lora.w13.a [A, E, r, D], lora.w13.b [A, E, 2F, r], lora.w2.a [A, E, r, F], lora.w2.b [A, E, D, r]."""
        lead = (self.adapters, experts)
        found: dict[str, Shape] = {}
        for name, shape in mlp.tensors("lora", hidden).items():
            if name.rpartition(".")[2].startswith("w"):
                rows, columns = shape
                found |= {f"{name}.a": (*lead, self.rank, columns), f"{name}.b": (*lead, rows, self.rank)}
        return found
