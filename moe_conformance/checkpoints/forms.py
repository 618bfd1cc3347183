"""The published forms of a quantised matrix: which tensors belong to its weights, of what dtypes and shapes.

Given the matrix's shape as floats and its stored tensors, finds what is wrong with them. Layouts: safetensors of
DeepSeek (`weight_scale_inv`, `scale`), gpt-oss (`_blocks`, `_scales`), compressed-tensors, ModelOpt, AutoGPTQ, AutoAWQ
and bitsandbytes, as their own code writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_conformance.checkpoints.scheme import Kind, Scheme
from moe_conformance.model.specs import Shape

FLOATS = ("F32", "BF16", "F16", "F64")
FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INTEGERS = ("I32", "I64")
E8M0 = ("F8_E8M0", "U8")
# Ends of the tensors that hold the weights themselves.
CARRIERS = ("weight", "weight_packed", "qweight", "blocks")
# Ends of the tensors that accompany such a carrier.
COMPANIONS = (
    *("weight_scale_inv", "weight_scale_2", "weight_scale", "weight_global_scale", "scale_inv", "scale_2", "scale"),
    *("input_scale", "input_global_scale", "weight_zero_point", "input_zero_point", "weight_shape", "weight_g_idx"),
    *("output_scale", "pre_quant_scale", "input_scale_ub", "activation_scale"),
    *("qzeros", "scales", "g_idx", "SCB", "weight_format", "bias"),
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"),
)
# Longest first: weight_scale ends in scale.
ENDS = tuple(sorted((*CARRIERS, *COMPANIONS), key=len, reverse=True))
# Any form may have an activation's scale; engines that quantise activations themselves skip it.
ALWAYS = frozenset(
    (
        *("input_scale", "input_global_scale", "input_zero_point", "input_scale_ub"),
        *("activation_scale", "output_scale", "pre_quant_scale"),
    )
)
# What distinguishes forms whose weights have the same dtype.
DECIDING = frozenset(
    (
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scale", "scale_inv"),
        *("scales", "qzeros", "g_idx", "absmax", "quant_map", "SCB"),
    )
)
# Carriers of each form, and their dtypes.
_CARRIED: Mapping[Kind, Mapping[str, tuple[str, ...]]] = {
    "fp8": {"weight": FP8},
    "mxfp8": {"weight": FP8},
    "int8": {"weight": ("I8",)},
    "bnb8": {"weight": ("I8",)},
    "bnb4": {"weight": ("U8",)},
    "packed": {"weight_packed": ("I32",)},
    "mxfp4": {"weight": ("U8", "I8", "F4"), "weight_packed": ("U8",), "blocks": ("U8",)},
    "mxfp6": {"weight_packed": ("U8",)},
    "nvfp4": {"weight": ("U8", "F4"), "weight_packed": ("U8",)},
    "gptq": {"qweight": ("I32",)},
    "awq": {"qweight": ("I32",)},
}
# bitsandbytes' blocks: 64 codes by default, 128 on ROCm, which only a tensor's content says; and 256 scales of them.
BNB_BLOCKS, BNB_NESTED = tuple(2**power for power in (6, 7, 5, 8, 9, 10, 11, 12)), 256


class Held(NamedTuple):
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Members = Mapping[str, Held]
Ends = frozenset[str]


def either(words: Iterable[str]) -> str:
    """a, b or c"""
    *most, last = tuple(words) or ("",)
    return f"{', '.join(most)} or {last}" if most else last


class Trouble(NamedTuple):
    """kind: of a Finding. end: which tensor of the matrix, by the end of its name."""

    kind: str
    end: str
    got: str
    want: str
    do: str


MEND = "mend the export, or quantise again"


@dataclass
class _Judge:
    """One matrix in one form.

    usual: ends that other matrices have. halves: gate and up lie one above the other in it. unread: companions that no
    rule has asked for.
    """

    members: Members
    usual: Ends = frozenset()
    halves: bool = False
    troubles: list[Trouble] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unread = set(self.members) - ALWAYS

    def want(self, end: str, dtypes: Iterable[str], shapes: Iterable[Shape], must: bool = True) -> None:
        """The tensor with this end is of one of these dtypes and shapes."""
        self.unread.discard(end)
        held, dtypes, shapes = self.members.get(end), tuple(dtypes), tuple(dict.fromkeys(shapes))
        wanted = f"{either(dtypes)} {either(str(list(shape)) for shape in shapes)}".rstrip()
        if held is None:
            if must:
                kind = "scales-missing" if "scale" in end or end in ("absmax", "SCB") else "missing"
                self.troubles.append(Trouble(kind, end, "no such tensor", wanted, MEND))
        elif held.dtype not in dtypes:
            self.troubles.append(Trouble("mistyped", end, str(held), wanted, MEND))
        elif shapes and held.shape not in shapes:
            is_scale = "scale" in end or end in ("absmax", "SCB")
            blocks = is_scale and any(len(shape) == len(held.shape) for shape in shapes if math.prod(shape) > 1)
            kind = "scale-blocks" if blocks else "misshapen"
            self.troubles.append(Trouble(kind, end, str(held), wanted, MEND))

    def one_of(self, ends: Iterable[str]) -> str:
        """The first of these ends that is there, or that other matrices have, or the first."""
        names = tuple(ends)
        usual = (end for end in names if end in self.usual)
        return next((end for end in names if end in self.members), next(usual, names[0]))


def kind_of(members: Members, scheme: Scheme | None = None, usual: Ends = frozenset()) -> Kind | None:
    """The form that the carrier is in; None for floats, and for what is in none of these forms.

    If the tensors do not tell, it follows from scheme (what the config says) and usual (ends that other matrices have).
    """
    if not DECIDING & members.keys():
        if scheme is not None and len(scheme.kinds) == 1:
            (only,) = scheme.kinds
            if any(end in members and members[end].dtype in dtypes for end, dtypes in _CARRIED[only].items()):
                return only
        tiled = not {"scale", "scale_inv", "weight_scale_inv"}.isdisjoint(usual) and "weight_scale" not in usual
        if tiled and "weight" in members and members["weight"].dtype == "I8":
            return "mxfp4"
    if "blocks" in members:
        return "mxfp4"
    if "qweight" in members:
        # Told apart by their scales: GPTQ packs along the rows of its tensor, AWQ along the columns.
        packed, scales = members["qweight"], members.get("scales")
        if scales is None and scheme is not None and scheme.kinds == {"awq"}:
            return "awq"
        if "g_idx" in members or scales is None or packed.shape[-1:] == scales.shape[-1:]:
            return "gptq"
        return "awq"
    if "weight_packed" in members:
        if members["weight_packed"].dtype != "U8":
            return "packed"
        scale = members.get("weight_scale")
        if scale and scale.dtype in E8M0 and scale.shape and members["weight_packed"].shape[-1] == scale.shape[-1] * 24:
            return "mxfp6"
        return "nvfp4" if "weight_global_scale" in members or (scale and scale.dtype in FP8) else "mxfp4"
    weight = members.get("weight")
    if weight is None:
        return None
    if weight.dtype in FP8:
        return "mxfp8" if _is_mx(members.get("weight_scale"), weight) else "fp8"
    if weight.dtype == "I8":
        if "SCB" in members:
            return "bnb8"
        tiles = [members[end].shape[-1:] for end in ("scale", "weight_scale_inv", "scale_inv") if end in members]
        return "mxfp4" if _groups_of(weight, 16) in tiles else "int8"
    if weight.dtype in ("U8", "F4"):
        if any(end in members for end in ("absmax", "quant_map")) or any(e.startswith("quant_state") for e in members):
            return "bnb4"
        scale = members.get("weight_scale", members.get("scale"))
        return "mxfp4" if scale and scale.dtype in E8M0 else "nvfp4"
    return None


def _groups_of(weight: Held, size: int) -> Shape:
    """How many groups of as many stored columns a row has."""
    return (-(-weight.shape[-1] // size),) if weight.shape else (0,)


def _is_mx(scale: Held | None, weight: Held) -> bool:
    """Whether there is a scale in e8m0 for each 32 columns, which no tile of fp8 is as small as."""
    if scale is None or scale.dtype not in E8M0 or len(weight.shape) < 2:
        return False
    return scale.dtype == "U8" or scale.shape == (*weight.shape[:-1], -(-weight.shape[-1] // 32))


def troubles_of(
    members: Members, want: Shape | None, scheme: Scheme | None, usual: Ends = frozenset(), halves: bool = False
) -> list[Trouble]:
    """What is wrong with a quantised matrix.

    want: its shape as floats, None if unknown. halves: gate and up lie one above the other in it.
    """
    kind = kind_of(members, scheme, usual)
    if kind is None or (scheme is not None and not scheme.known):
        return []
    judge = _Judge(members, usual, halves)
    shape = want or _inferred(kind, members, scheme)
    if shape is not None and len(shape) >= 2:
        _FORMS[kind](judge, shape[:-2], shape[-2], shape[-1], scheme or Scheme(""))
        judge.want("bias", FLOATS, (shape[:-1],), must=False)
        judge.troubles += [
            Trouble("extra", end, str(members[end]), f"none with {kind} weights", "remove it, or mend the export")
            for end in sorted(judge.unread - {"bias", *CARRIERS})
        ]
    if scheme is not None and scheme.kinds and kind not in scheme.kinds:
        carrier = next(end for end in CARRIERS if end in members)
        said = f"{either(sorted(scheme.kinds))}, as quantization_config says ({scheme.method})"
        do = "take config.json from where the tensors come from"
        judge.troubles.append(Trouble("contradiction", carrier, f"{kind} weights", said, do))
    return judge.troubles


def _inferred(kind: Kind, members: Members, scheme: Scheme | None) -> Shape | None:
    """The shape as floats, as far as the tensors themselves show it."""
    if kind == "mxfp4" and "blocks" in members:
        *lead, groups, half = members["blocks"].shape
        return (*lead, groups * half * 2)
    carrier = members.get("weight") or members.get("weight_packed")
    if carrier is None or len(carrier.shape) < 2 or kind in ("packed", "bnb4"):
        return None
    if kind == "mxfp6":
        return (*carrier.shape[:-1], carrier.shape[-1] * 4 // 3)
    return (*carrier.shape[:-1], carrier.shape[-1] * (2 if kind in ("mxfp4", "nvfp4") else 1))


def _whole(lead: Shape) -> tuple[Shape, ...]:
    """Shapes of one number a matrix; of packed experts also one for all."""
    return tuple(dict.fromkeys(((*lead,), (*lead, 1), (*lead, 1, 1), (), (1,))))


def _rows(lead: Shape, rows: int, columns: int) -> tuple[Shape, ...]:
    """Shapes of one number an output; of experts that are packed transposed, outputs are columns.

    Of these transformers' FbgemmFp8Llama4TextExperts has [E, 1, outputs] for gate and up, [E, outputs, 1] for down.
    """
    found = (*lead, rows, 1), (*lead, rows)
    return (*found, (*lead, 1, columns), (*lead, columns, 1)) if lead else found


def _fp8(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    judge.want("weight", FP8, ((*lead, rows, columns),))
    names = ["weight_scale", "weight_scale_inv"]
    if scheme.blocks or not scheme.strategies:
        names.reverse()
    end = judge.one_of((*names, "scale_inv", "scale"))
    shapes = _scales(judge, lead, rows, columns, scheme, tiled=end.endswith("inv") or end == "scale")
    judge.want(end, (*FLOATS, "F8_E8M0"), shapes)
    if scheme.static:
        judge.want(judge.one_of(("input_scale", "activation_scale")), FLOATS, _whole(lead))


def _scales(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme, tiled: bool) -> tuple[Shape, ...]:
    """Shapes that the scales of 8-bit weights may have. tiled: their name says that they are of tiles."""
    found: tuple[Shape, ...] = ()
    blocks = scheme.blocks or frozenset(((128, 128),))
    said = scheme.strategies or frozenset(("block",) if tiled and scheme.blocks else ("block", "tensor", "channel"))
    if "block" in said:
        found += tuple((*lead, -(-rows // high), -(-columns // wide)) for high, wide in sorted(blocks))
        if judge.halves:  # each half has its own tiles
            found += tuple((*lead, 2 * -(-rows // (2 * high)), -(-columns // wide)) for high, wide in sorted(blocks))
    if "tensor" in said:
        found += (*_whole(lead), *(((*lead, 2), (*lead, 2, 1)) if judge.halves else ()))
    if said & {"channel", "token"}:
        found += _rows(lead, rows, columns)
    if "group" in said:
        found += tuple((*lead, rows, -(-columns // size)) for size in sorted(scheme.groups) if size)
    return found


def _int8(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    judge.want("weight", ("I8",), ((*lead, rows, columns),))
    shapes = _scales(judge, lead, rows, columns, scheme, tiled=False)
    end = judge.one_of(("weight_scale", "weight_scale_inv", "scale"))
    judge.want(end, FLOATS, shapes)
    asymmetric = False in scheme.symmetric and True not in scheme.symmetric
    judge.want("weight_zero_point", ("I8",), shapes, must=asymmetric)


def _packed(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    """compressed-tensors' pack-quantized: 32 / bits codes an int32, along the columns."""
    weight = judge.members["weight_packed"]
    bits = sorted(scheme.bits) or [_bits_of(weight, columns)]
    judge.want("weight_packed", ("I32",), ((*lead, rows, -(-columns * size // 32)) for size in bits))
    groups = [-(-columns // size) if size else 1 for size in sorted(scheme.groups)]
    if scheme.strategies & {"channel"} or (scheme.strategies and not groups):
        groups.append(1)
    scale = judge.members.get("weight_scale")
    if not groups:  # nothing says how many: any number that divides
        count = scale.shape[-1] if scale and scale.shape else 1
        groups = [count if count and columns % count == 0 else 1]
    shapes = [(*lead, rows, count) for count in groups]
    if "tensor" in scheme.strategies:
        shapes += _whole(lead)
    judge.want("weight_scale", FLOATS, shapes)
    judge.want("weight_shape", INTEGERS, ((2,), (len(lead) + 2,), (*lead, 2)))
    asymmetric = False in scheme.symmetric and True not in scheme.symmetric
    # Packed as the weights are, along the rows.
    points = [(*lead, -(-rows * size // 32), count) for size in bits for count in groups]
    judge.want("weight_zero_point", ("I32",), points, must=asymmetric)
    if scheme.symmetric == {True} and "weight_zero_point" in judge.members:
        judge.troubles.append(
            Trouble(
                "contradiction",
                "weight_zero_point",
                "zero points",
                "none, as quantization_config says symmetric",
                "take config.json from where the tensors come from",
            )
        )
    judge.want("weight_g_idx", INTEGERS, ((columns,), (*lead, columns)), must=scheme.ordered)


def _bits_of(weight: Held, columns: int) -> int:
    """4 or 8, whichever the number of int32 a row says."""
    return 8 if weight.shape[-1:] == (-(-columns // 4),) else 4


def _mxfp4(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    groups = (*lead, rows, -(-columns // 32))
    if "blocks" in judge.members:
        judge.want("blocks", ("U8",), ((*groups, 16),))
        judge.want("scales", E8M0, (groups,))
        return
    carrier = judge.one_of(("weight_packed", "weight"))
    judge.want(carrier, ("U8", "I8", "F4"), _halved(judge, carrier, lead, rows, columns))
    end = judge.one_of(("weight_scale", "scale", "weight_scale_inv", "scale_inv"))
    # transformers keeps DeepSeek-V4's as floats where it may not have e8m0.
    judge.want(end, (*E8M0, "F32") if end.endswith("inv") else E8M0, (groups,))


def _halved(judge: _Judge, carrier: str, lead: Shape, rows: int, columns: int) -> tuple[Shape, ...]:
    """Two a byte; a dtype of four bits counts elements."""
    per = 1 if judge.members[carrier].dtype == "F4" else 2
    return ((*lead, rows, -(-columns // per)),)


def _mxfp6(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    """Four in three bytes."""
    judge.want("weight_packed", ("U8",), ((*lead, rows, columns * 3 // 4),))
    judge.want("weight_scale", E8M0, ((*lead, rows, -(-columns // 32)),))


def _mxfp8(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    judge.want("weight", FP8, ((*lead, rows, columns),))
    judge.want("weight_scale", E8M0, ((*lead, rows, -(-columns // 32)),))


def _nvfp4(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    carrier = judge.one_of(("weight_packed", "weight"))
    judge.want(carrier, ("U8", "F4"), _halved(judge, carrier, lead, rows, columns))
    # ModelOpt scales whole groups alone: of a row that they do not divide, the rest is of the last one.
    counts = (-(-columns // 16), max(columns // 16, 1))
    judge.want("weight_scale", ("F8_E4M3",), ((*lead, rows, count) for count in counts))
    end = "weight_global_scale" if carrier == "weight_packed" else judge.one_of(("weight_scale_2", "scale_2"))
    judge.want(end, ("F32",), (*_whole(lead), *(((*lead, 2),) if judge.halves else ())))


def _gptq(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    """Stored transposed: [columns in, rows out], the columns packed."""
    weight, scales = judge.members["qweight"], judge.members.get("scales")
    bits = sorted(scheme.bits) or [8 if weight.shape[-2:-1] == (-(-columns // 4),) else 4]
    groups = _groups(scheme, scales, columns)
    judge.want("qweight", ("I32",), ((*lead, -(-columns * size // 32), rows) for size in bits))
    judge.want("scales", FLOATS, ((*lead, count, rows) for count in groups))
    judge.want("qzeros", ("I32",), ((*lead, count, -(-rows * size // 32)) for count in groups for size in bits))
    judge.want("g_idx", ("I32",), ((columns,), (*lead, columns)), must=scheme.ordered)


def _awq(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    """Stored transposed: [columns in, rows out], the rows packed."""
    bits = sorted(scheme.bits) or [4]
    groups = _groups(scheme, judge.members.get("scales"), columns)
    judge.want("qweight", ("I32",), ((*lead, columns, -(-rows * size // 32)) for size in bits))
    judge.want("scales", FLOATS, ((*lead, count, rows) for count in groups))
    judge.want("qzeros", ("I32",), ((*lead, count, -(-rows * size // 32)) for count in groups for size in bits))


def _groups(scheme: Scheme, scales: Held | None, columns: int) -> list[int]:
    """How many groups of columns there may be."""
    if scheme.groups:
        return [-(-columns // size) if size else 1 for size in sorted(scheme.groups)]
    count = scales.shape[-2] if scales and len(scales.shape) > 1 else 1
    return [count if count and columns % count == 0 else 1]


def _bnb4(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    """Flat: two codes a byte, a scale for each 64 of them, or another power of two, which may be quantised again."""
    codes = math.prod((*lead, rows, columns))
    fitting = [-(-codes // size) for size in BNB_BLOCKS]
    absmax = judge.members.get("absmax")
    blocks = absmax.shape[0] if absmax and absmax.shape and absmax.shape[0] in fitting else fitting[0]
    judge.want("weight", ("U8",), (((codes + 1) // 2, 1), ((codes + 1) // 2,)))
    nested = "nested_absmax" in judge.members or "nested_quant_map" in judge.members
    judge.want("absmax", ("U8",) if nested else ("F32",), ((blocks,),))
    judge.want("quant_map", ("F32",), ((16,),))
    if nested:
        judge.want("nested_absmax", ("F32",), ((-(-blocks // BNB_NESTED),),))
        judge.want("nested_quant_map", ("F32",), ((256,),))
    state = judge.one_of(("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"))
    judge.want(state, ("U8",), ())


def _bnb8(judge: _Judge, lead: Shape, rows: int, columns: int, scheme: Scheme) -> None:
    judge.want("weight", ("I8",), ((*lead, rows, columns),))
    judge.want("SCB", ("F32",), ((*lead, rows),))
    judge.want("weight_format", ("U8",), ((),), must=False)


_FORMS = {
    "fp8": _fp8,
    "int8": _int8,
    "packed": _packed,
    "mxfp4": _mxfp4,
    "mxfp6": _mxfp6,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "gptq": _gptq,
    "awq": _awq,
    "bnb4": _bnb4,
    "bnb8": _bnb8,
}
