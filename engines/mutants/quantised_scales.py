"""Experts that read a stored weight with what belongs to another, each in one form or one kind of call alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.checkpoints.scheme import Kind
from moe_conformance.engine import ExpertsInputs, Loaded
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.checkpoint import forms
from moe_conformance.reference_impl.checkpoint.forms import Form

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


class Fp8WithoutAlpha(Faulty):
    """DeepGEMM#87: the fused kernel of fp8 clamps, and takes alpha 1 and no up offset."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.format != "fp8_e4m3":
            return super().experts(inputs)
        return super().experts(replace(inputs, mlp=replace(inputs.mlp, alpha=1.0, up_offset=0.0)))


class BiasLostInNvfp4(Faulty):
    """vllm#46645: biases are handed on in the branch of MXFP4 alone."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.format != "nvfp4" or not inputs.mlp.bias:
            return super().experts(inputs)
        none = {name: torch.zeros_like(inputs.tensors[name]) for name in ("experts.b13", "experts.b2")}
        return super().experts(replace(inputs, tensors={**inputs.tensors, **none}))


class ZeroPointZeroWraps(Faulty):
    """GPTQModel#2350: a zero point of 0 is stored as -1 in four bits, and read as 15."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.quant is None or inputs.quant.format != "int4":
            return super().experts(inputs)
        return super().experts(changed(inputs, "zero_point", lambda zero, _: zero.where(zero != 0, 16)))


class LoadsOtherwise(Faulty):
    """One form is read by another function."""

    kind: Kind
    read: Callable[[Form], Tensor]

    def load(self, folder: Path) -> dict[str, Tensor]:
        with patch.dict(forms.FORMS, {self.kind: self.read}):
            return super().load(folder)


def _multiplied(form: Form) -> Tensor:
    renamed = {"weight_scale_2" if end == "weight_global_scale" else end: t for end, t in form.tensors.items()}
    return forms.read_nvfp4(form._replace(tensors=renamed))


def _as_second_version(form: Form) -> Tensor:
    return forms.read_gptq(form._replace(said={**form.said, "checkpoint_format": "gptq_v2"}))


def _in_order(form: Form) -> Tensor:
    columns = torch.arange(form.shape[-1], dtype=torch.int32) // (form.shape[-1] // form.tensors["scales"].shape[-2])
    return forms.read_gptq(form._replace(tensors={**form.tensors, "g_idx": columns}))


def _without_zero_points(form: Form) -> Tensor:
    return forms.read_packed(
        form._replace(tensors={end: t for end, t in form.tensors.items() if end != "weight_zero_point"})
    )


def _from_the_end(form: Form) -> Tensor:
    index = form.tensors.get("weight_g_idx")
    if index is None:
        return forms.read_packed(form)
    groups = form.tensors["weight_scale"].shape[-1]
    return forms.read_packed(form._replace(tensors={**form.tensors, "weight_g_idx": index % groups}))


def _unsaid_is_the_second(form: Form) -> Tensor:
    return forms.read_gptq(form._replace(said={"checkpoint_format": "gptq_v2", **form.said}))


def _one_scale(form: Form) -> Tensor:
    scale = form.tensors.get("weight_scale")
    if scale is None or scale.dim() != 1:
        return forms.read_scaled(form)
    return forms.read_scaled(form._replace(tensors={**form.tensors, "weight_scale": scale[:1]}))


class MultipliesByTheGlobalScale(LoadsOtherwise):
    """compressed-tensors' weight_global_scale, taken for ModelOpt's weight_scale_2."""

    kind, read = "nvfp4", staticmethod(_multiplied)


class ZeroPointsOfTheSecondVersion(LoadsOtherwise):
    """What "gptq" stores is one less than the zero point."""

    kind, read = "gptq", staticmethod(_as_second_version)


class ColumnsInTheirOrder(LoadsOtherwise):
    """g_idx is not looked at."""

    kind, read = "gptq", staticmethod(_in_order)


class ZeroPointsForgotten(LoadsOtherwise):
    """An asymmetric checkpoint is read as a symmetric one."""

    kind, read = "packed", staticmethod(_without_zero_points)


class NoOrderIsTheLastGroup(LoadsOtherwise):
    """-1, which stands for no order, counts from the end."""

    kind, read = "packed", staticmethod(_from_the_end)


class UnsaidIsTheSecondVersion(LoadsOtherwise):
    """Zero points of files that say no version are taken as they are."""

    kind, read = "gptq", staticmethod(_unsaid_is_the_second)


class RowsTakeTheFirstScale(LoadsOtherwise):
    """A scale of one dim is taken for one of the whole matrix."""

    kind, read = "fp8", staticmethod(_one_scale)


class ScalesOfTheSameFile(Faulty):
    """What belongs to a weight is looked for in its own file, and is one where that has none."""

    def load(self, folder: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file, save_file

        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            for file in sorted(Path(copy).glob("*.safetensors")):
                held = load_file(file)
                for name in held:
                    if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") not in held:
                        held[name] = torch.ones_like(held[name])
                save_file(held, file)
            return super().load(Path(copy))


class ScalesOfTheWholeLayer(Faulty):
    """vllm#49638: of experts that are packed, the scales are those of the first one."""

    def load(self, folder: Path) -> dict[str, Tensor]:
        def first(form: Form) -> Tensor:
            if len(form.shape) < 3:
                return forms.read_mxfp4(form)
            scales = form.tensors["scales"]
            return forms.read_mxfp4(form._replace(tensors={**form.tensors, "scales": scales[:1].expand_as(scales)}))

        with patch.dict(forms.FORMS, {"mxfp4": first}):
            return super().load(folder)


class LiesWithGateBelowUp(Faulty):
    """The numbers are right; what lies in memory has the scales of up above those of gate."""

    def load(self, folder: Path) -> dict[str, Tensor]:
        got = super().load(folder)
        for _, tensors in got.stored.values() if isinstance(got, Loaded) else ():
            scale = tensors["experts.w13.scale"]
            tensors["experts.w13.scale"] = torch.cat(scale.chunk(2, 1)[::-1], 1) if scale.dim() > 1 else scale
        return got


def _mutant(engine: type[Faulty], fault: str, case: str, check: str = WEIGHTS) -> Mutant:
    return Mutant(engine, "quantised-scales", fault, (f"experts-stored-{case}", check), frozenset({"expert-lora"}))


def _loads(engine: type[Faulty], fault: str, form: str, layout: str = "by-expert") -> Mutant:
    case = f"load-stored-{form}-{layout}"
    return Mutant(engine, "quantised-scales", fault, (case, "a_load_gives_the_numbers_of_every_form"))


MUTANTS = (
    _loads(MultipliesByTheGlobalScale, "weights are multiplied by weight_global_scale", "nvfp4"),
    _loads(ZeroPointsOfTheSecondVersion, "GPTQ's zero points are one too small", "gptq"),
    _loads(ColumnsInTheirOrder, "g_idx is not looked at", "gptq"),
    _loads(ZeroPointsForgotten, "packed weights have no zero points", "int4-packed-zero"),
    _loads(NoOrderIsTheLastGroup, "an index of -1 is the last group", "int4-packed-no-order"),
    _loads(UnsaidIsTheSecondVersion, "GPTQ of no said version is of the second", "gptq-int8"),
    _loads(RowsTakeTheFirstScale, "all rows have the first one's scale", "fp8-rows"),
    _loads(ScalesOfTheSameFile, "scales in another file than their weights are one", "fp8-block", "by-expert-shuffled"),
    _loads(ScalesOfTheWholeLayer, "packed experts have the first one's scales", "mxfp4-blocks", "packed"),
    _loads(LiesWithGateBelowUp, "what lies in memory has gate's scales and up's exchanged", "fp8-block"),
    _mutant(CutTileTakesTheOneBefore, "a cut tile takes the scale of the one before", "fp8-block-halves-cut"),
    _mutant(UpTakesTheScaleOfGate, "up takes the scale of gate", "fp8-tensor-halves"),
    _mutant(UpTakesTheGlobalScaleOfGate, "up takes the global scale of gate", "nvfp4-halves"),
    _mutant(ScaleOfTheExpertBeforeInHalf, "scales are of the expert before, in float16", "int8-channel-fp16"),
    _mutant(ZeroPointOfTheFirstGroup, "all groups have the first one's zero point", "int4-group-zero"),
    _mutant(GroupsAreOf32, "groups of 16 are read as groups of 32", "int4-group-cut"),
    _mutant(GlobalScaleTwiceUnderAMap, "the global scale is applied twice under an expert map", "nvfp4-ep"),
    _mutant(Fp8WithoutAlpha, "fp8 experts have alpha 1 and no up offset", "fp8-block-swiglu-oai"),
    _mutant(BiasLostInNvfp4, "NVFP4 experts lose their biases", "nvfp4-bias"),
    _mutant(ZeroPointZeroWraps, "a zero point of 0 is 16", "int4-group-zero-cut"),
    _mutant(OneScaleARow, "activations have one scale a row, not one a group", "fp8-block-group", ACTIVATIONS),
    _mutant(InputScaleOfTheFirstMatrix, "what enters w2 is quantised by w13's scale", "fp8-tensor-static", ACTIVATIONS),
    _mutant(OddColumnsFirst, "the high bits of a byte are the even column", "mxfp4-cut"),
)
