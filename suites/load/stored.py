"""Writes tiny quantised checkpoints in the forms that releases and quantisers publish, and what each one's numbers are.

Codes and scales are drawn, not quantised: what a load must give is exact. Written from the layouts' own descriptions,
apart from what reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_conformance.judging.inputs import bits, integers, normal
from moe_conformance.suites.load.checkpoint import save
from moe_conformance.suites.load.forms import EXPERTS, FAMILIES, HIDDEN, WIDTH, Family, config_of

# Rows and columns of a tile, columns of a group.
TILE, GROUP = 16, 8
Parts = dict[str, Tensor]
Shape = tuple[int, ...]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# bitsandbytes' NF4, from https://arxiv.org/abs/2305.14314, appendix E, in five digits: a file has its own map.
NF4 = (
    *(-1.0, -0.6962, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0),
    *(0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0),
)
# Of eight outputs, which one each four bits of a word hold, the lowest first.
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def scales(shape: Shape, seed: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of four significant bits, over six powers of two."""
    value = (1 + (bits(shape, seed) % 8).double() / 8) * torch.exp2((bits(shape, f"{seed} size") % 6 - 9).double())
    return value.to(dtype)


def spread(scale: Tensor, shape: Shape, high: int, wide: int) -> Tensor:
    """Each element's own of a scale for so many rows and columns."""
    rows, columns = torch.arange(shape[-2]) // high, torch.arange(shape[-1]) // wide
    return scale.double()[..., rows, :][..., columns]


def words(codes: Tensor, dim: int, size: int, order: tuple[int, ...] = ()) -> Tensor:
    """int32 of codes of so many bits along a dim, the lowest bits first; a code may reach over the end of a word.

    order: of as many codes as it has, which one each place holds.
    """
    line = codes.movedim(dim, -1)
    if order:
        line = line.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)
    line = (line[..., None] >> torch.arange(size) & 1).flatten(-2)  # one bit each
    line = torch.nn.functional.pad(line, (0, -line.shape[-1] % 32)).unflatten(-1, (-1, 32))
    total = (line << torch.arange(32)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32).movedim(-1, dim).contiguous()


def halves(codes: Tensor) -> Tensor:
    """uint8 of two codes of four bits, the even column low."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp8(
    shape: Shape, seed: str, size: Shape, high: int, wide: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = normal(shape, seed, std=64.0).to(torch.float8_e4m3fn), scales(size, f"{seed} scale", torch.float32)
    if dtype == torch.float8_e8m0fnu:
        byte = integers(size, f"{seed} scale", 124, 116).to(torch.uint8)
        scale, stored = torch.exp2(byte.double() - 127), byte.view(dtype)
    else:
        stored = scale.to(dtype)
    return codes, stored, codes.double() * spread(scale, shape, high, wide)


def tiled(shape: Shape) -> Shape:
    return (*shape[:-2], -(-shape[-2] // TILE), -(-shape[-1] // TILE))


def fp8_block(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    weight, scale, numbers = fp8(shape, seed, tiled(shape), TILE, TILE, torch.float32)
    return {"weight": weight, "weight_scale_inv": scale}, numbers


def fp8_block_e8m0(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    weight, scale, numbers = fp8(shape, seed, tiled(shape), TILE, TILE, torch.float8_e8m0fnu)
    return {"weight": weight, "scale": scale}, numbers


def fp8_channel(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    weight, scale, numbers = fp8(shape, seed, (*shape[:-1], 1), 1, shape[-1], torch.bfloat16)
    return {"weight": weight, "weight_scale": scale}, numbers


def fp8_tensor(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """ModelOpt's, with the scale of activations; that of one matrix may be a number or an array of one."""
    weight, scale, numbers = fp8(shape, seed, (*shape[:-2], 1, 1), shape[-2], shape[-1], torch.float32)
    scale = scale.reshape(shape[:-2])
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.full(shape[:-2] or (1,), 0.5)}, numbers


def mxfp8(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    weight, scale, numbers = fp8(shape, seed, (*shape[:-1], -(-shape[-1] // 32)), 1, 32, torch.float8_e8m0fnu)
    return {"weight": weight, "weight_scale": scale.view(torch.uint8)}, numbers


def fp8_rows(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """AMD's: scales of rows without a dim for the one column."""
    parts, numbers = fp8_channel(shape, seed)
    return {**parts, "weight_scale": parts["weight_scale"][..., 0].contiguous()}, numbers


def fbgemm(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """Of experts that lie transposed, with a scale for each output: columns."""
    weight, scale, numbers = fp8(shape, seed, (*shape[:-2], 1, shape[-1]), shape[-2], 1, torch.float32)
    return {"": weight, "scale": scale}, numbers


def fp8_group(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    weight, scale, numbers = fp8(shape, seed, (*shape[:-1], -(-shape[-1] // GROUP)), 1, GROUP, torch.bfloat16)
    return {"weight": weight, "weight_scale": scale}, numbers


def fp8_number(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """compressed-tensors', one scale a tensor: an array of one."""
    parts, numbers = fp8_tensor(shape, seed)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale"].reshape(*shape[:-2], 1)}, numbers


def int8_channel(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    codes, scale = integers(shape, seed, 128, -128).to(torch.int8), scales((*shape[:-1], 1), f"{seed} scale")
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def torchao(shape: Shape, seed: str, kind: str) -> tuple[Parts, Tensor]:
    """A tensor's parts by name, as torchao flattens them for safetensors."""
    if kind == "fp8":
        weight, scale, numbers = fp8(shape, seed, (*shape[:-1], 1), 1, shape[-1], torch.float32)
        return {"_weight_qdata": weight, "_weight_scale": scale}, numbers
    parts, _ = int8_channel(shape, seed)
    codes, scale = parts["weight"], parts["weight_scale"]
    zeros = integers(scale.shape, f"{seed} zero", 8, -8).to(torch.int8)
    stored = {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zeros}
    return stored, (codes.double() - zeros.double()) * scale.double()


def auto_round(shape: Shape, seed: str, less: int = 1) -> tuple[Parts, Tensor]:
    """AutoRound's, in GPTQ's words; a group's scale is negative where its largest weight is positive."""
    codes, zeros, scale = grouped(shape, seed, 4, GROUP)
    scale = torch.where(bits(scale.shape, f"{seed} sign") % 2 == 0, scale, -scale)
    zeros = torch.full_like(zeros, 8)
    numbers = (codes - spread(zeros, shape, 1, GROUP)) * spread(scale, shape, 1, GROUP)
    stored = {"qweight": words(codes.mT, -2, 4), "qzeros": words((zeros - less).mT, -1, 4)}
    return {**stored, "scales": scale.mT.contiguous()}, numbers


def grouped(shape: Shape, seed: str, size: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales of groups of columns, [.., rows, groups]; wide: 0 for one group a row."""
    count = (*shape[:-1], -(-shape[-1] // (wide or shape[-1])))
    zeros = integers(count, f"{seed} zero", 2**size - 1, 1)
    return integers(shape, seed, 2**size), zeros, scales(count, f"{seed} scale", torch.float16)


def ordered(columns: int, seed: str, wide: int) -> Tensor:
    """The group of each column, columns by their importance."""
    return (bits((columns,), f"{seed} order").argsort() // wide).to(torch.int32)


def packed(
    shape: Shape, seed: str, symmetric: bool, size: int = 4, wide: int = GROUP, order: bool = False
) -> tuple[Parts, Tensor]:
    """compressed-tensors' pack-quantized. wide: of a group, 0 for one a row. order: groups have an order of columns."""
    codes, zeros, scale = grouped(shape, seed, size, wide)
    zeros = torch.full_like(zeros, 2 ** (size - 1)) if symmetric else zeros
    index = ordered(shape[-1], seed, wide) if order else torch.arange(shape[-1]) // (wide or shape[-1])
    numbers = (codes - zeros[..., index.long()]).double() * scale.double()[..., index.long()]
    parts = {"weight_packed": words(codes, -1, size), "weight_scale": scale, "weight_shape": torch.tensor(shape[-2:])}
    parts |= {"weight_g_idx": index} if order else {}
    return parts | ({} if symmetric else {"weight_zero_point": words(zeros, -2, size)}), numbers


def packed_tensor(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """One scale for all of a matrix."""
    codes, scale = integers(shape, seed, 16), scales((*shape[:-2], 1), f"{seed} scale", torch.float16)
    parts = {"weight_packed": words(codes, -1, 4), "weight_scale": scale, "weight_shape": torch.tensor(shape[-2:])}
    return parts, (codes - 8) * scale.double()[..., None]


def packed_no_order(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    """An index that nothing was ordered by, as its tensor was made."""
    parts, numbers = packed(shape, seed, True)
    return {**parts, "weight_g_idx": torch.full((shape[-1],), -1, dtype=torch.int32)}, numbers


def gptq(
    shape: Shape, seed: str, less: int = 1, size: int = 4, wide: int = GROUP, order: bool = True
) -> tuple[Parts, Tensor]:
    """AutoGPTQ's, columns in the order of their importance, or in their own. less: what a stored zero point lacks."""
    codes, zeros, scale = grouped(shape, seed, size, wide)
    index = ordered(shape[-1], seed, wide) if order else (torch.arange(shape[-1]) // (wide or shape[-1])).int()
    numbers = (codes - zeros[..., index.long()]).double() * scale.double()[..., index.long()]
    parts = {
        "qweight": words(codes.mT, -2, size),
        "qzeros": words((zeros - less).mT, -1, size),
        "scales": scale.mT.contiguous(),
        "g_idx": index,
    }
    return parts, numbers


def awq(shape: Shape, seed: str, wide: int = GROUP) -> tuple[Parts, Tensor]:
    wide = wide or shape[-1]
    codes, zeros, scale = grouped(shape, seed, 4, wide)
    numbers = (codes - spread(zeros, shape, 1, wide)) * spread(scale, shape, 1, wide)
    stored = {"qweight": words(codes.mT, -1, 4, AWQ), "qzeros": words(zeros.mT, -1, 4, AWQ)}
    return {**stored, "scales": scale.mT.contiguous()}, numbers


def fp4(shape: Shape, seed: str) -> tuple[Tensor, Tensor]:
    codes = integers(shape, seed, 16)
    return halves(codes), torch.tensor(E2M1, dtype=torch.float64)[codes]


def mxfp4(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    stored, numbers = fp4(shape, seed)
    byte = integers((*shape[:-1], -(-shape[-1] // 32)), f"{seed} scale", 128, 118).to(torch.uint8)
    numbers = numbers * spread(torch.exp2(byte.double() - 127), shape, 1, 32)
    return {"weight_packed": stored, "weight_scale": byte}, numbers


def mxfp4_blocks(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    parts, numbers = mxfp4(shape, seed)
    return {"blocks": parts["weight_packed"].unflatten(-1, (-1, 16)), "scales": parts["weight_scale"]}, numbers


def nvfp4(shape: Shape, seed: str, modelopt: bool) -> tuple[Parts, Tensor]:
    """ModelOpt multiplies by the second scale, compressed-tensors divides by it.

    ModelOpt has scales of whole groups alone: of a row that they do not divide, the last one has the rest.
    """
    stored, numbers = fp4(shape, seed)
    count = max(shape[-1] // 16, 1) if modelopt else -(-shape[-1] // 16)
    scale = (scales((*shape[:-1], count), f"{seed} scale") * 64).to(torch.float8_e4m3fn)
    whole = scales(shape[:-2], f"{seed} whole")
    group = (torch.arange(shape[-1]) // 16).clamp(max=count - 1)
    numbers = numbers * scale.double()[..., group]
    if modelopt:
        parts = {"weight": stored, "weight_scale": scale, "weight_scale_2": whole, "input_scale": whole / 2}
        return parts, numbers * whole.double()[..., None, None]
    whole = whole if shape[:-2] else whole.reshape(1)
    parts = {"weight_packed": stored, "weight_scale": scale, "weight_global_scale": whole}
    return parts, numbers / whole.double().reshape(*shape[:-2], 1, 1)


def bnb4(shape: Shape, seed: str, block: int = 64, nested: bool = True) -> tuple[Parts, Tensor]:
    """A scale for each block of codes; nested: it is a code itself, of a map of 256, around a mean."""
    count = math.prod(shape)
    codes, blocks = integers((count,), seed, 16), count // block
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": shape}
    largest = scales((blocks,), f"{seed} absmax")
    parts = {"weight.absmax": largest}
    if nested:
        absmax, mean = integers((blocks,), f"{seed} absmax", 256).to(torch.uint8), 0.0625
        entries, above = normal((256,), "map", std=0.25), scales((-(-blocks // 256),), f"{seed} nested")
        largest = entries.double()[absmax.long()] * above.double()[torch.arange(blocks) // 256] + mean
        state |= {"nested_blocksize": 256, "nested_offset": mean, "nested_dtype": "float32"}
        parts = {"weight.absmax": absmax, "weight.nested_absmax": above, "weight.nested_quant_map": entries}
    parts |= {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    numbers = torch.tensor(NF4).double()[codes] * largest.double()[torch.arange(count) // block]
    return parts, numbers.reshape(shape)


def bnb8(shape: Shape, seed: str) -> tuple[Parts, Tensor]:
    codes, largest = integers(shape, seed, 128, -127).to(torch.int8), scales(shape[:-1], f"{seed} largest")
    return {"weight": codes, "SCB": largest}, codes.double() * largest.double()[..., None] / 127


ENCODED: Mapping[str, Callable[[Shape, str], tuple[Parts, Tensor]]] = {
    "fp8-block": fp8_block,
    "fp8-block-e8m0": fp8_block_e8m0,
    "fp8-channel": fp8_channel,
    "fp8-tensor": fp8_tensor,
    "fp8-number": fp8_number,
    "fp8-rows": fp8_rows,
    "fp8-fbgemm": fbgemm,
    "fp8-group": fp8_group,
    "fp8-tensor-halves": lambda shape, seed: without_input_scale(*fp8_tensor(shape, seed)),
    "fp8-block-halves": fp8_block,
    "mxfp8": mxfp8,
    "int8-channel": int8_channel,
    "int4-packed": lambda shape, seed: packed(shape, seed, True),
    "int4-packed-zero": lambda shape, seed: packed(shape, seed, False),
    "int3-packed-zero": lambda shape, seed: packed(shape, seed, False, 3),
    "int4-packed-tensor": packed_tensor,
    "int4-packed-no-order": packed_no_order,
    "int4-packed-row": lambda shape, seed: packed(shape, seed, True, wide=0),
    "int4-packed-order": lambda shape, seed: packed(shape, seed, True, order=True),
    "int8-packed": lambda shape, seed: packed(shape, seed, True, 8),
    "int8-packed-zero": lambda shape, seed: packed(shape, seed, False, 8),
    "gptq": gptq,
    "gptq-v2": lambda shape, seed: gptq(shape, seed, 0),
    "gptq-in-order": lambda shape, seed: gptq(shape, seed, order=False),
    "gptq-row": lambda shape, seed: gptq(shape, seed, wide=0, order=False),
    "gptq-int8": lambda shape, seed: gptq(shape, seed, size=8, order=False),
    "awq": awq,
    "awq-channel": lambda shape, seed: awq(shape, seed, wide=0),
    "auto-round": auto_round,
    "auto-round-gptqmodel": lambda shape, seed: auto_round(shape, seed, 0),
    "auto-round-awq": awq,
    "torchao-int8": lambda shape, seed: torchao(shape, seed, "int8"),
    "torchao-fp8": lambda shape, seed: torchao(shape, seed, "fp8"),
    "mxfp4": mxfp4,
    "mxfp4-blocks": mxfp4_blocks,
    "nvfp4": lambda shape, seed: nvfp4(shape, seed, False),
    "nvfp4-modelopt": lambda shape, seed: nvfp4(shape, seed, True),
    "bnb-nf4": bnb4,
    "bnb-nf4-plain": lambda shape, seed: bnb4(shape, seed, 128, nested=False),
    "bnb-int8": bnb8,
}


def without_input_scale(parts: Parts, numbers: Tensor) -> tuple[Parts, Tensor]:
    return {end: tensor for end, tensor in parts.items() if end != "input_scale"}, numbers


def encoded(form: str, shape: Shape, seed: str, has_halves: bool) -> tuple[Parts, Tensor]:
    """has_halves: it is gate above up, which some forms give scales of their own."""
    if not (has_halves and form.endswith("-halves")):
        return ENCODED[form](shape, seed)
    half = (*shape[:-2], shape[-2] // 2, shape[-1])
    (gate, above), (up, below) = (ENCODED[form](half, f"{seed} {name}") for name in ("gate", "up"))
    # Tiles of up lie below those of gate, numbers of whole matrices beside each other.
    parts = {
        end: _above(one, up[end]) if one.dim() > 1 else torch.stack([one, up[end]], -1) for end, one in gate.items()
    }
    return parts, torch.cat([above, below], -2)


def _above(gate: Tensor, up: Tensor) -> Tensor:
    """float8 has no concatenation on a CPU of every release."""
    if gate.dtype != torch.float8_e4m3fn:
        return torch.cat([gate, up], -2)
    return torch.cat([gate.view(torch.uint8), up.view(torch.uint8)], -2).view(gate.dtype)


def write(folder: Path, recipe: Mapping[str, Any], seed: str = "stored") -> dict[str, Tensor]:
    """Write the folder of a case, and return what a load must give: float64 for stored weights, others as they are."""
    family, form = recipe["model_type"], recipe["stored"]
    names, width = FAMILIES[family], recipe.get("width", WIDTH)
    config, modelopt = config_of(family, form, recipe["left"], width)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if modelopt is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(modelopt, indent=2))
    named: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    layers = config["num_hidden_layers"]
    for layer in range(names.dense, layers + names.draft):
        block = f"model.layers.{layer}.{names.block}"
        own = dict(_layer(names, recipe, block, f"{seed} {layer}", width, named))
        if layer < layers:
            want |= {f"layers.{layer}.{name}": tensor for name, tensor in own.items()}
    save(folder, named, shards=3 if recipe.get("shuffled") else 2, shuffled=recipe.get("shuffled", False))
    return want


def _layer(
    names: Family, recipe: Mapping[str, Any], block: str, seed: str, width: int, named: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What a load must give of a layer, whose tensors are added to `named`. block: before their names."""
    form = recipe["stored"]
    for name, shape in names.router.items():
        named[f"{block}{name}"] = router = normal(shape, f"{seed} {name}")
        yield names.canonical[name], router
    for name, (shape, target) in names.biases.items():
        named[f"{block}{name}"] = bias = normal(shape, f"{seed} {name}")
        yield f"experts.{target}", torch.cat([bias[:, 0::2], bias[:, 1::2]], 1) if target == "b13" else bias
    shapes = (width, HIDDEN), (width, HIDDEN), (HIDDEN, width)

    def matrix(stem: str, shape: Shape, has_halves: bool = False) -> Tensor:
        if any(left in f"{stem}." for left in recipe["left"]):
            named[f"{stem}.weight"] = floats = normal(shape, f"{seed} {stem}", std=0.125)
            return floats.double()
        parts, numbers = encoded(form, shape, f"{seed} {stem}", has_halves)
        if form == "fp8-fbgemm" and stem.endswith("down_proj"):  # as transformers writes them
            parts["scale"] = parts["scale"].mT.contiguous()
        named.update({names.spelled(stem, end): tensor for end, tensor in parts.items()})
        return numbers.double()

    if names.shared:
        gate, up, down = (
            matrix(f"{block}{names.shared}{part}", shape) for part, shape in zip(names.split, shapes, strict=True)
        )
        yield "shared.w13", torch.cat([gate, up])
        yield "shared.w2", down
    if recipe["layout"] == "packed":
        packed_shapes = (EXPERTS, 2 * width, HIDDEN), (EXPERTS, HIDDEN, width)
        if names.transposed:
            packed_shapes = (EXPERTS, HIDDEN, 2 * width), (EXPERTS, width, HIDDEN)
        both, down = (
            matrix(f"{block}{name}", shape, name == names.packed[0] and not names.interleaved)
            for name, shape in zip(names.packed, packed_shapes, strict=True)
        )
        both, down = (both.mT, down.mT) if names.transposed else (both, down)
        yield "experts.w13", torch.cat([both[:, 0::2], both[:, 1::2]], dim=1) if names.interleaved else both
        yield "experts.w2", down
        return
    gate, up, down = (
        torch.stack([matrix(f"{block}experts.{expert}.{part}", shape) for expert in range(EXPERTS)])
        for part, shape in zip(names.split, shapes, strict=True)
    )
    yield "experts.w13", torch.cat([gate, up], dim=1)
    yield "experts.w2", down
