"""A stored matrix, in each published form, as numbers. Which tensors a form has is in moe_conformance/checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_conformance.checkpoints.forms import BNB_BLOCKS, BNB_NESTED
from moe_conformance.checkpoints.scheme import Kind, Scheme
from moe_conformance.errors import CheckpointError, InputError
from moe_conformance.model.specs import Shape
from moe_conformance.quote import plainly, quoted
from moe_conformance.reference_impl.quantised.fp4 import unpack_e2m1
from moe_conformance.reference_impl.quantised.gptq import dequantise_awq, dequantise_gptq
from moe_conformance.reference_impl.quantised.integers import dequantise_groups, unpack
from moe_conformance.reference_impl.quantised.tiles import Tile, scale_values, spread

Members = Mapping[str, Tensor]


# What values of tensors, and of the JSON in one, may lead to; shapes and dtypes have been looked at.
_WRONG = (InputError, ValueError, TypeError, LookupError, RuntimeError, AttributeError)


class Form(NamedTuple):
    """One matrix as its checkpoint has it.

    tensors: by the end of each one's name. shape: of its numbers, [rows, columns] or with experts before. halves: gate
    and up lie one above the other in it. said: quantization_config as it is.
    """

    kind: Kind
    tensors: Members
    shape: Shape
    scheme: Scheme
    halves: bool
    said: Mapping[str, Any]

    def one_of(self, *ends: str) -> Tensor:
        return next(self.tensors[end] for end in ends if end in self.tensors)

    def stacked(self, tensor: Tensor, sides: int = 2) -> Tensor:
        """[E, ..], with E = 1 of a matrix by itself."""
        return tensor if len(self.shape) == 3 or tensor.dim() > sides else tensor[None]


def numbers(form: Form) -> Tensor:
    """float64 of form.shape. Raises CheckpointError for a form that is not read."""
    read = FORMS.get(form.kind)
    if read is None:
        raise CheckpointError(f"{form.kind} weights: got a form that is not read; load it with what wrote it")
    try:
        return read(form).reshape(form.shape)
    except _WRONG as error:
        trouble = plainly(str(error)) or type(error).__name__
        raise CheckpointError(f"{form.kind} weights: {trouble}; mend the export, or quantise again") from error


def _rows_columns(form: Form) -> tuple[int, int, int]:
    """E, rows and columns."""
    *lead, rows, columns = form.shape
    return (lead[0] if lead else 1), rows, columns


def each(form: Form, scale: Tensor) -> Tensor:
    """Each element's own of a scale, or zero point, of whichever layout it has: [E, rows, columns] float64."""
    experts, rows, columns = shape = _rows_columns(form)
    if scale.numel() == 1:
        return scale_values(scale).double().reshape(1, 1, 1).expand(shape)
    tile, stacked, laid = layout(form, tuple(scale.shape))
    if laid == "columns":
        return scale_values(scale).reshape(experts, 1, columns).expand(shape)
    down = {"tensor": stacked, "rows": rows}.get(laid, scale.shape[-2] if scale.dim() > 1 else 1)
    floats = scale if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale.float()
    return spread(floats.reshape(experts, down, -1), shape, tile, stacked)


def layout(form: Form, shape: Shape) -> tuple[Tile, int, str]:
    """Tile, matrices stacked, and a word for a scale of this shape, which `checkpoint` has let through."""
    experts, rows, columns = _rows_columns(form)
    own = shape[1:] if len(form.shape) == 3 and shape[:1] == (experts,) else shape
    if math.prod(own) == 1:
        return (0, 0), 1, "tensor"
    if form.halves and own in ((2,), (2, 1)):
        return (0, 0), 2, "tensor"
    if own in ((rows,), (rows, 1)):
        return (1, 0), 1, "rows"
    if own in ((1, columns), (columns, 1)) and len(form.shape) == 3:
        return (0, 1), 1, "columns"
    for high, wide in sorted(form.scheme.blocks) or [(128, 128)]:
        if own == (-(-rows // high), -(-columns // wide)):
            return (high, wide), 1, "block"
        if form.halves and own == (2 * -(-rows // (2 * high)), -(-columns // wide)):
            return (high, wide), 2, "block"
    for size in sorted(form.scheme.groups):
        if size and own[-1] == -(-columns // size):
            return (1, size), 1, "group"
    raise InputError(f"scale: got {list(shape)}, want that of a tile, a row, or a group as quantization_config says")


def read_scaled(form: Form) -> Tensor:
    """fp8 and int8: code, less its zero point, times scale."""
    codes = form.stacked(form.tensors["weight"]).double()
    if "weight_zero_point" in form.tensors:
        codes = codes - each(form, form.tensors["weight_zero_point"].double())
    return codes * each(form, form.one_of("weight_scale", "weight_scale_inv", "scale_inv", "scale"))


def _by_group(form: Form, size: int, scale: Tensor) -> Tensor:
    """[E, rows, columns] of [E, rows, groups]; of a row that groups do not divide, the last one has the rest."""
    experts, rows, columns = _rows_columns(form)
    index = (torch.arange(columns) // size).clamp(max=scale.shape[-1] - 1)  # ModelOpt scales whole groups alone
    return scale.reshape(experts, rows, -1)[..., index]


def read_mxfp8(form: Form) -> Tensor:
    scale = scale_values(form.tensors["weight_scale"])
    return form.stacked(form.tensors["weight"]).double() * _by_group(form, 32, scale)


def read_mxfp4(form: Form) -> Tensor:
    experts, rows, columns = _rows_columns(form)
    codes = form.one_of("blocks", "weight_packed", "weight").view(torch.uint8).reshape(experts, rows, -1)
    scale = form.one_of("scales", "weight_scale", "scale", "weight_scale_inv", "scale_inv")
    return unpack_e2m1(codes)[..., :columns] * _by_group(form, 32, scale_values(scale))


def read_nvfp4(form: Form) -> Tensor:
    experts, rows, columns = _rows_columns(form)
    codes = form.one_of("weight_packed", "weight").view(torch.uint8).reshape(experts, rows, -1)
    found = unpack_e2m1(codes)[..., :columns] * _by_group(form, 16, form.tensors["weight_scale"].double())
    if "weight_global_scale" in form.tensors:  # compressed-tensors divides by it
        return found / each(form, form.tensors["weight_global_scale"])
    return found * each(form, form.one_of("weight_scale_2", "scale_2"))


def read_packed(form: Form) -> Tensor:
    """compressed-tensors' pack-quantized: codes of 2 to 8 bits, the middle added to them."""
    experts, rows, columns = _rows_columns(form)
    words = form.stacked(form.tensors["weight_packed"])
    bits = bits_of(form, words.shape[-1], columns)
    scale = of_rows(form, form.tensors["weight_scale"])
    zeros = torch.full(scale.shape, 2 ** (bits - 1))
    if "weight_zero_point" in form.tensors:
        zeros = unpack(form.stacked(form.tensors["weight_zero_point"]), 1, bits)[:, :rows]
    index = form.tensors.get("weight_g_idx")
    if index is None or bool((index < 0).any()):  # what nothing was ordered by is filled with -1
        index = torch.arange(columns) // group_of(form, columns, scale.shape[-1])
    index = index.int().expand(experts, columns)
    return dequantise_groups(unpack(words, 2, bits)[..., :columns], zeros, scale, index, torch.float64)


def of_rows(form: Form, scale: Tensor) -> Tensor:
    """[E, rows, groups] of scales of groups, of rows, of matrices, or of all of them."""
    experts, rows, _ = _rows_columns(form)
    each = scale.reshape(-1, 1, 1) if scale.numel() in (1, experts) else scale.reshape(experts, rows, -1)
    return each.expand(experts, rows, each.shape[-1])


def bits_of(form: Form, words: int, columns: int) -> int:
    """Of a code of compressed-tensors, of which so many words hold a row."""
    fitting = [bits for bits in (4, 8, 2, 3, 5, 6, 7) if words == -(-columns * bits // 32)]
    return next((bits for bits in fitting if bits in form.scheme.bits), fitting[0])


def group_of(form: Form, columns: int, count: int) -> int:
    """How many columns a group has, of which there are so many; unsaid, they divide a row."""
    said = (size for size in sorted(form.scheme.groups) if size and -(-columns // size) == count)
    return next(said, columns // count)


def read_gptq(form: Form) -> Tensor:
    columns = form.shape[-1]
    qweight, scales = form.stacked(form.tensors["qweight"]), form.stacked(form.tensors["scales"])
    index = form.tensors.get("g_idx")
    return dequantise_gptq(
        qweight,
        scales,
        qzeros=form.stacked(form.tensors["qzeros"]),
        group=-1 if scales.shape[1] == 1 else group_of(form, columns, scales.shape[1]),
        checkpoint_format=version_of(form),
        desc_act=bool(form.said.get("desc_act")),
        g_idx=None if index is None else index.expand(len(qweight), columns),
        bits=qweight.shape[1] * 32 // columns,
        dtype=torch.float64,
    )


def version_of(form: Form) -> Any:
    """Whether stored zero points lack one. AutoGPTQ's files of old say nothing; AutoRound's say how they are packed."""
    packing = form.said.get("packing_format")
    if isinstance(packing, str):
        return "gptq_v2" if packing in ("auto_round", "auto_round:gptqmodel") else "gptq"
    return form.said.get("checkpoint_format") or "gptq"


def read_awq(form: Form) -> Tensor:
    scales = form.stacked(form.tensors["scales"])
    group = -1 if scales.shape[1] == 1 else group_of(form, form.shape[-1], scales.shape[1])
    if form.scheme.bits not in (frozenset(), {4}):
        raise InputError(f"bits: got {quoted(sorted(form.scheme.bits))}, want 4, as AWQ packs them")
    qweight, qzeros = (form.stacked(form.tensors[name]) for name in ("qweight", "qzeros"))
    return dequantise_awq(qweight, scales, qzeros=qzeros, group=group, dtype=torch.float64)


def read_bnb8(form: Form) -> Tensor:
    return form.tensors["weight"].double() * (form.tensors["SCB"].double() / 127)[..., None]


def read_bnb4(form: Form) -> Tensor:
    """Flat, the high four bits first: an entry of the map times its block's largest magnitude."""
    state = next((tensor for end, tensor in form.tensors.items() if end.startswith("quant_state")), None)
    said = json.loads(bytes(state.tolist())) if state is not None else {}
    count, block = math.prod(form.shape), said.get("blocksize", BNB_BLOCKS[0])
    packed = form.tensors["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:count]
    largest = form.tensors["absmax"]
    if "nested_absmax" in form.tensors:
        size = said.get("nested_blocksize", BNB_NESTED)
        nested = form.tensors["nested_absmax"].double().repeat_interleave(size)[: len(largest)]
        entries = form.tensors["nested_quant_map"].double()[largest.long()]
        largest = entries * nested + said.get("nested_offset", 0.0)
    return form.tensors["quant_map"].double()[codes.long()] * largest.double().repeat_interleave(block)[:count]


FORMS: dict[Kind, Callable[[Form], Tensor]] = {
    "fp8": read_scaled,
    "int8": read_scaled,
    "mxfp8": read_mxfp8,
    "mxfp4": read_mxfp4,
    "nvfp4": read_nvfp4,
    "packed": read_packed,
    "gptq": read_gptq,
    "awq": read_awq,
    "bnb4": read_bnb4,
    "bnb8": read_bnb8,
}
