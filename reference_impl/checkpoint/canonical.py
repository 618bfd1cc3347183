"""Stored experts of a layer as one QuantSpec and the tensors that it names, where the form has one.

No QuantSpec says act-order, bitsandbytes' flat blocks, or scales of columns: such layers have numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_conformance.model.storage import Format, QuantSpec
from moe_conformance.reference_impl.checkpoint.forms import Form, bits_of, group_of, layout, of_rows, version_of
from moe_conformance.reference_impl.quantised.gptq import AWQ_ORDER
from moe_conformance.reference_impl.quantised.integers import unpack
from moe_conformance.reference_impl.quantised.tiles import scale_values


@dataclass(frozen=True)
class Packed:
    """Matrices of one form: what QuantSpec says of them, and their tensors by the end of the name, "" for the codes.

    tensors: [E, ..], E = 1 for one of them. stacked: matrices above each other that have tiles of their own.
    """

    quant: QuantSpec
    tensors: Mapping[str, Tensor]
    stacked: int = 1


# How a layer stores one matrix: gate (0), up (1), or all of it; of one expert, or of all.
Place = tuple[int | None, int | None]
Matrix = Literal["w13", "w1", "w2"]


def packed(form: Form) -> Packed | None:
    """None where no QuantSpec says what the form is."""
    experts = form.shape[0] if len(form.shape) == 3 else 1
    rows, columns = form.shape[-2:]
    t = form.tensors
    match form.kind:
        case "fp8" | "int8":
            return _eight_bits(form, experts)
        case "mxfp8" if t["weight"].dtype == torch.float8_e4m3fn:
            scale = scale_values(t["weight_scale"]).float().reshape(experts, rows, -1)
            return Packed(
                QuantSpec("fp8_e4m3", "group", group=32),
                {"": t["weight"].reshape(experts, rows, columns), "scale": scale},
            )
        case "bnb8":
            scale = (t["SCB"].double() / 127).float().reshape(experts, rows)
            return Packed(
                QuantSpec("int8", "channel"), {"": t["weight"].reshape(experts, rows, columns), "scale": scale}
            )
        case "mxfp4":
            scale = form.one_of("scales", "weight_scale", "scale", "weight_scale_inv", "scale_inv")
            if scale.element_size() > 1:
                return None
            codes = form.one_of("blocks", "weight_packed", "weight").view(torch.uint8)
            stored = {"": codes.reshape(experts, rows, -1), "scale": scale.view(torch.uint8).reshape(experts, rows, -1)}
            return Packed(QuantSpec("mxfp4", "group", group=32), stored)
        case "nvfp4":
            return _nvfp4(form, experts)
        case "packed" | "gptq" | "awq":
            return _integers(form, experts)
    return None


def _eight_bits(form: Form, experts: int) -> Packed | None:
    rows, columns = form.shape[-2:]
    codes = form.tensors["weight"].reshape(experts, rows, columns)
    name: Format = "fp8_e4m3" if form.kind == "fp8" else "int8"
    if form.kind == "fp8" and codes.dtype != torch.float8_e4m3fn:
        return None
    scale = form.one_of("weight_scale", "weight_scale_inv", "scale_inv", "scale")
    tile, stacked, laid = layout(form, tuple(scale.shape))
    if laid == "columns":
        return None
    floats = scale_values(scale).float()
    zeros = form.tensors.get("weight_zero_point")
    quant = QuantSpec(name, "tensor", zero_points=zeros is not None)
    match laid:
        case "tensor":
            shape: tuple[int, ...] = (experts, 2) if stacked == 2 else (experts,)
            floats = floats.reshape(1).expand(shape) if floats.numel() == 1 else floats
        case "rows":
            quant, shape = replace(quant, granularity="channel"), (experts, rows)
        case "block":
            quant, shape = replace(quant, granularity="block", block=tile), (experts, *scale.shape[-2:])
        case _:
            quant, shape = replace(quant, granularity="group", group=tile[1]), (experts, rows, scale.shape[-1])
    stored = {"": codes, "scale": floats.reshape(shape)}
    if zeros is not None:
        stored["zero_point"] = (
            zeros.reshape(1).expand(shape) if zeros.numel() == 1 else zeros.reshape(shape)
        ).contiguous()
    return Packed(quant, stored, stacked)


def _nvfp4(form: Form, experts: int) -> Packed | None:
    rows, columns = form.shape[-2:]
    codes = form.one_of("weight_packed", "weight").view(torch.uint8).reshape(experts, rows, -1)
    scale = form.tensors["weight_scale"].reshape(experts, rows, -1)
    if scale.shape[-1] != -(-columns // 16):
        return None
    divisor = form.tensors.get("weight_global_scale")
    whole = form.one_of("weight_scale_2", "scale_2") if divisor is None else (1 / divisor.double()).float()
    stacked = 2 if whole.numel() == 2 * experts and form.halves else 1
    whole = (
        whole.reshape(1).expand(experts)
        if whole.numel() == 1
        else whole.reshape((experts, 2) if stacked == 2 else (experts,))
    )
    stored = {"": codes, "scale": scale, "global_scale": whole}
    return Packed(QuantSpec("nvfp4", "group", group=16), stored, stacked)


def _integers(form: Form, experts: int) -> Packed | None:
    """Codes and zero points from their words: outputs first, as canonical tensors have them."""
    rows, columns = form.shape[-2:]
    index = form.tensors.get("weight_g_idx", form.tensors.get("g_idx"))
    scale = form.tensors["weight_scale" if form.kind == "packed" else "scales"]
    scale = of_rows(form, scale) if form.kind == "packed" else scale.reshape(experts, -1, rows).mT
    group = group_of(form, columns, scale.shape[-1])
    in_order = torch.arange(columns) // group
    if index is not None and bool((index >= 0).all()) and not bool((index == in_order).all()):
        return None
    bits = _bits(form, columns)
    if bits not in (4, 8):
        return None
    codes, zeros = _unpacked(form, experts, rows, columns, bits)
    quant = QuantSpec("int4" if bits == 4 else "int8", "group", group=group, zero_points=zeros is not None)
    if scale.shape[-1] == 1:
        quant, scale = replace(quant, granularity="channel", group=0), scale[..., 0]
    stored = {"": _coded(codes, zeros is not None, bits), "scale": scale.float().contiguous()}
    if zeros is not None:
        shifted = zeros if bits == 4 else zeros - 128
        if bits == 8 and int(shifted.max()) > 127:
            return None
        stored["zero_point"] = shifted.reshape(scale.shape).to(torch.uint8 if bits == 4 else torch.int8)
    return Packed(quant, stored)


def _bits(form: Form, columns: int) -> int:
    """Bits of a code."""
    if form.kind == "awq":
        return 4
    if form.kind == "gptq":
        return form.tensors["qweight"].shape[-2] * 32 // columns
    return bits_of(form, form.tensors["weight_packed"].shape[-1], columns)


def _unpacked(form: Form, experts: int, rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor | None]:
    """int64 codes [E, rows, columns], and zero points [E, rows, groups], None where all are the middle."""
    t = form.tensors
    if form.kind == "packed":
        zeros = t.get("weight_zero_point")
        codes = unpack(form.stacked(t["weight_packed"]), 2, bits)[..., :columns]
        return codes, None if zeros is None else unpack(form.stacked(zeros), 1, bits)[:, :rows]
    words, zero_words = form.stacked(t["qweight"]), form.stacked(t["qzeros"])
    if form.kind == "gptq":
        less = int(version_of(form) == "gptq")
        return unpack(words, 1, bits).mT, unpack(zero_words, 2, bits).mT + less
    order = [AWQ_ORDER.index(column) for column in range(8)]
    codes, zeros = (unpack(each, 2).unflatten(-1, (-1, 8))[..., order].flatten(-2).mT for each in (words, zero_words))
    return codes, zeros


def _coded(codes: Tensor, with_zeros: bool, bits: int) -> Tensor:
    if bits == 8:
        return (codes - 128).to(torch.int8)
    if not with_zeros:  # the middle is 8; two's complement
        codes = codes ^ 8
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def of_layer(
    found: Mapping[Matrix, Mapping[Place, Packed | None]], experts: int
) -> tuple[QuantSpec, dict[str, Tensor]] | None:
    """The QuantSpec of all of a layer's matrices, and experts.NAME with what belongs to it; None if they differ."""
    whole: dict[Matrix, Packed] = {}
    for name, places in found.items():
        one = _joined(dict(places), experts)
        if one is None:
            return None
        whole[name] = one
    specs = {one.quant for one in whole.values()}
    if len(specs) != 1:
        return None
    split = any(one.stacked == 2 for one in whole.values())
    quant = replace(specs.pop(), split_gate_up=split)
    return quant, dict(_named(whole))


def _named(whole: Mapping[Matrix, Packed]) -> Iterator[tuple[str, Tensor]]:
    for name, one in whole.items():
        for end, tensor in one.tensors.items():
            yield f"experts.{name}{f'.{end}' if end else ''}", tensor.contiguous()


def _joined(places: dict[Place, Packed | None], experts: int) -> Packed | None:
    """Experts on top of each other, up below gate."""
    if any(one is None for one in places.values()):
        return None
    found: dict[Place, Packed] = {place: one for place, one in places.items() if one is not None}
    halves = sorted({half for half, _ in found}, key=lambda half: half or 0)
    parts: list[Packed] = []
    for half in halves:
        if (half, None) in found:
            parts.append(found[half, None])
            continue
        each = [found.get((half, expert)) for expert in range(experts)]
        stacked = _stacked([one for one in each if one is not None])
        if stacked is None or None in each:
            return None
        parts.append(stacked)
    if len(parts) == 1:
        return parts[0]
    gate, up = parts
    if gate.quant != up.quant or gate.tensors.keys() != up.tensors.keys():
        return None
    tensors = {}
    for end in gate.tensors:
        above, below = gate.tensors[end], up.tensors[end]
        tensors[end] = torch.stack([above, below], dim=1) if above.dim() == 1 else _cat([above, below], 1)
    own = gate.quant.granularity in ("tensor", "block") or "global_scale" in gate.tensors
    return Packed(gate.quant, tensors, 2 if own else 1)


def _stacked(each: list[Packed]) -> Packed | None:
    first = each[0]
    if any(one.quant != first.quant or one.stacked != first.stacked for one in each):
        return None
    return replace(first, tensors={end: _cat([one.tensors[end] for one in each], 0) for end in first.tensors})


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """float8 has no concatenation on a CPU of every release."""
    if parts[0].element_size() == 1 and parts[0].is_floating_point():
        return torch.cat([part.view(torch.uint8) for part in parts], dim).view(parts[0].dtype)
    return torch.cat(parts, dim)


def deinterleaved(one: Packed) -> Packed | None:
    """Rows as gate, up, gate, up -> gate above up; None where a tile has rows of both."""
    if one.quant.granularity == "block" or one.stacked == 2:
        return None
    rows = one.tensors[""].shape[1]
    tensors = {}
    for end, tensor in one.tensors.items():
        by_row = tensor.dim() > 1 and tensor.shape[1] == rows
        tensors[end] = _cat([tensor[:, 0::2], tensor[:, 1::2]], 1) if by_row else tensor
    return replace(one, tensors=tensors)
