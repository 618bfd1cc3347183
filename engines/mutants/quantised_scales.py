"""Experts that read a stored weight with what belongs to another, each in one form or one kind of call alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

WEIGHTS = "stored_weights_take_their_own_scales"
ACTIVATIONS = "activations_are_quantised_by_their_own_scales"


def changed(inputs: ExpertsInputs, part: str, change: object) -> ExpertsInputs:
    """With `change(tensor, columns)` of the tensors NAME.part of both matrices; columns: of the matrix."""
    assert callable(change)
    tensors = dict(inputs.tensors)
    for name, tensor in inputs.tensors.items():
        if name.endswith(f".{part}"):
            columns = inputs.mlp.width if ".w2." in name else inputs.x.shape[-1]
            tensors[name] = change(tensor.clone(), columns)
    return replace(inputs, tensors=tensors)


class CutTileTakesTheOneBefore(Faulty):
    """The number of tiles is rounded down, and an index beyond the last is clamped to it."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant = inputs.quant
        if quant is None or quant.granularity != "block":
            return super().experts(inputs)

        def clamped(scale: Tensor, columns: int) -> Tensor:
            whole = columns // quant.block[1]
            scale[..., whole:] = scale[..., whole - 1 : whole]
            return scale

        return super().experts(changed(inputs, "scale", clamped))


class UpTakesTheScaleOfGate(Faulty):
    """One scale is kept for w13 where gate and up have one each."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant = inputs.quant
        if quant is None or not quant.split_gate_up or quant.granularity != "tensor":
            return super().experts(inputs)
        return super().experts(changed(inputs, "scale", lambda s, _: s[:, :1].expand_as(s) if s.dim() > 1 else s))


class UpTakesTheGlobalScaleOfGate(Faulty):
    """vllm#54974: w13_weight_scale_2[:, 0]."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        first = changed(inputs, "global_scale", lambda s, _: s[:, :1].expand_as(s) if s.dim() > 1 else s)
        return super().experts(first)


class ScaleOfTheExpertBeforeInHalf(Faulty):
    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.x.dtype != torch.float16:
            return super().experts(inputs)
        return super().experts(changed(inputs, "scale", lambda scale, _: scale.roll(1, 0)))


class ZeroPointOfTheFirstGroup(Faulty):
    """sglang#37759: where a tile of the kernel spans groups, the zero points of one are loaded."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant = inputs.quant
        if quant is None or quant.granularity != "group":
            return super().experts(inputs)
        return super().experts(changed(inputs, "zero_point", lambda zero, _: zero[..., :1].expand_as(zero)))


class GroupsAreOf32(Faulty):
    """sglang#38573: the kernel is told a group size of its own, whatever the checkpoint has."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant = inputs.quant
        if quant is None or (quant.format, quant.group) != ("int4", 16) or quant.zero_points:
            return super().experts(inputs)
        return super().experts(changed(inputs, "scale", lambda s, _: s[..., torch.arange(s.shape[-1]) // 2]))


class GlobalScaleTwiceUnderAMap(Faulty):
    """vllm#26135: scales are folded into alphas of local experts, and once more where they are gathered."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is None:
            return super().experts(inputs)
        return super().experts(changed(inputs, "global_scale", lambda scale, _: scale * scale))


class OneScaleARow(Faulty):
    """Activations into tiles are quantised by row, not by group."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant = inputs.quant
        if quant is None or quant.activations != "group":
            return super().experts(inputs)
        return super().experts(replace(inputs, quant=replace(quant, activations="token")))


class InputScaleOfTheFirstMatrix(Faulty):
    """The static scale of w13's activations serves for w2's, too."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.activations != "static":
            return super().experts(inputs)
        first = "experts.w13" if inputs.mlp.gated else "experts.w1"
        scale = inputs.tensors[f"{first}.input_scale"]
        return super().experts(replace(inputs, tensors={**inputs.tensors, "experts.w2.input_scale": scale}))


class OddColumnsFirst(Faulty):
    """The high four bits of MXFP4 are taken for the even column."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.format != "mxfp4":
            return super().experts(inputs)
        swapped = {
            name: (codes >> 4 | codes << 4) if name in ("experts.w13", "experts.w1", "experts.w2") else codes
            for name, codes in inputs.tensors.items()
        }
        return super().experts(replace(inputs, tensors=swapped))


def _mutant(engine: type[Faulty], fault: str, case: str, check: str = WEIGHTS) -> Mutant:
    return Mutant(engine, "quantised-scales", fault, (f"experts-stored-{case}", check), frozenset({"expert-lora"}))


MUTANTS = (
    _mutant(CutTileTakesTheOneBefore, "a cut tile takes the scale of the one before", "fp8-block-halves-cut"),
    _mutant(UpTakesTheScaleOfGate, "up takes the scale of gate", "fp8-tensor-halves"),
    _mutant(UpTakesTheGlobalScaleOfGate, "up takes the global scale of gate", "nvfp4-halves"),
    _mutant(ScaleOfTheExpertBeforeInHalf, "scales are of the expert before, in float16", "int8-channel-fp16"),
    _mutant(ZeroPointOfTheFirstGroup, "all groups have the first one's zero point", "int4-group-zero"),
    _mutant(GroupsAreOf32, "groups of 16 are read as groups of 32", "int4-group-cut"),
    _mutant(GlobalScaleTwiceUnderAMap, "the global scale is applied twice under an expert map", "nvfp4-ep"),
    _mutant(OneScaleARow, "activations have one scale a row, not one a group", "fp8-block-group", ACTIVATIONS),
    _mutant(InputScaleOfTheFirstMatrix, "what enters w2 is quantised by w13's scale", "fp8-tensor-static", ACTIVATIONS),
    _mutant(OddColumnsFirst, "the high bits of a byte are the even column", "mxfp4-cut"),
)
