"""Dequantised FP8, MXFP4 and NVFP4 weights: each scale meets its own tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_conformance.errors import InputError
from moe_conformance.judging.compare import equal
from moe_conformance.judging.inputs import bits, integers, normal
from moe_conformance.reference_impl.quantised.fp4 import (
    dequantise_mxfp4,
    dequantise_nvfp4,
    quantise_mxfp4,
    quantise_nvfp4,
    swizzle,
    unpack_e2m1,
    unswizzle,
)
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8, through_fp8
from moe_conformance.reference_impl.quantised.tiles import (
    BLOCK_128,
    PER_CHANNEL,
    PER_TENSOR,
    Tile,
    scale_shape,
    scale_values,
    spread,
    tile_amax,
)

E4M3 = torch.float8_e4m3fn
D64 = torch.float64


def codes(shape: tuple[int, ...], seed: str) -> Tensor:
    """FP8 codes of every sign and size, none of them NaN."""
    byte = (bits(shape, seed) & 255).to(torch.uint8)
    return byte.where(byte & 127 != 127, 1).view(E4M3)


def scales(shape: tuple[int, ...], seed: str) -> Tensor:
    """float32 scales from 2^-100 to 2^20, all different, some 0."""
    found = normal(shape, seed).abs() + 0.3
    exponent = integers(shape, seed + "exponent", 21, -100)
    return (found * torch.exp2(exponent.float())).where(integers(shape, seed + "zero", 7) > 0, 0.0)


# The example of a grid in full: 2 halves of 3 rows, 5 columns, tiles of 2 x 2.
def test_tiles_are_cut_at_the_seam_of_two_halves_and_at_the_right_end() -> None:
    scale = torch.tensor([[[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]])
    want = [
        [1, 1, 2, 2, 3],
        [1, 1, 2, 2, 3],
        [4, 4, 5, 5, 6],
        [7, 7, 8, 8, 9],
        [7, 7, 8, 8, 9],
        [10, 10, 11, 11, 12],
    ]
    assert spread(scale, (1, 6, 5), (2, 2), stacked=2).tolist() == [want]


def test_a_tiles_magnitude_is_that_of_its_own_elements() -> None:
    weight = torch.tensor([[[1.0, -9, 2, 0, 3], [0, 4, 0, -5, 0], [6, 0, 0, 0, -7], [0, 1, 8, 0, 0]]])
    assert tile_amax(weight, (2, 2), stacked=1).tolist() == [[[9, 5, 3], [6, 8, 7]]]
    assert tile_amax(weight, (3, 0), stacked=2).tolist() == [[[9], [8]]]
    assert tile_amax(weight, (1, 4), stacked=2).tolist() == [[[9, 3], [5, 0], [6, 7], [8, 0]]]


GRIDS: list[tuple[Tile, int]] = [
    (PER_TENSOR, 1),
    (PER_TENSOR, 2),
    (PER_CHANNEL, 2),
    (BLOCK_128, 1),
    (BLOCK_128, 2),
    ((1, 32), 1),
    ((64, 128), 2),
]


@pytest.mark.parametrize(("tile", "stacked"), GRIDS)
def test_each_fp8_tile_meets_its_own_scale(tile: Tile, stacked: int) -> None:
    """Every element by itself. 134 rows a half and 300 columns: no block divides either."""
    experts, rows, cols = 3, 268, 300
    weight = codes((experts, rows, cols), "weight")
    scale = scales((experts, *scale_shape(rows, cols, tile, stacked)), "scale")
    half = rows // stacked
    height, width = tile[0] or half, tile[1] or cols
    tiles_a_half = -(-half // height)
    row = torch.tensor([r // half * tiles_a_half + r % half // height for r in range(rows)])
    col = torch.tensor([c // width for c in range(cols)])
    want = weight.double() * scale.double()[:, row][:, :, col]
    equal("float64", dequantise_fp8(weight, scale, tile=tile, stacked=stacked, dtype=D64), want)
    equal("float32", dequantise_fp8(weight, scale, tile=tile, stacked=stacked), want.float())


def test_block_scales_with_tails_agree_with_transformers() -> None:
    weight, scale = codes((3, 200, 300), "weight"), scales((3, 2, 3), "scale")
    want = _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    equal("weight", dequantise_fp8(weight, scale, tile=BLOCK_128), want)


def test_fp8_scales_may_be_powers_of_two_in_a_byte() -> None:
    weight = codes((2, 3, 64), "weight")
    byte = integers((2, 3, 2), "exponent", 140, 100).to(torch.uint8)
    want = dequantise_fp8(weight, torch.exp2(byte.double() - 127), tile=(1, 32), dtype=D64)
    for scale in (byte, byte.view(torch.float8_e8m0fnu)):
        equal(str(scale.dtype), dequantise_fp8(weight, scale, tile=(1, 32), dtype=D64), want)


@pytest.mark.parametrize(("tile", "stacked"), GRIDS)
def test_fp8_comes_back_within_half_a_step(tile: Tile, stacked: int) -> None:
    weight = normal((2, 268, 300), "weight") * torch.tensor([2.5, 1e-30]).reshape(2, 1, 1)
    weight[0, :3] = 0
    got = dequantise_fp8(*quantise_fp8(weight, tile=tile, stacked=stacked), tile=tile, stacked=stacked, dtype=D64)
    amax = spread(tile_amax(weight, tile, stacked), weight.shape, tile, stacked)
    # Half a step is |w| / 16 for normal codes, half the smallest step (2^-9 of a scale of amax / 448) below.
    limit = torch.maximum(weight.double().abs() / 16, amax / 448 * 2**-10) * (1 + 1e-6)
    assert ((got - weight).abs() <= limit).all()


def test_fp8_quantisation_uses_the_whole_range_of_each_tile() -> None:
    values, scale = quantise_fp8(normal((2, 268, 300), "weight"), tile=BLOCK_128, stacked=2)
    assert tile_amax(values.double(), BLOCK_128, 2).eq(448).all()
    _, rounded = quantise_fp8(normal((2, 268, 300), "weight"), tile=BLOCK_128, stacked=2, power_of_two=True)
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert (rounded >= scale).all() and (rounded < 2 * scale).all()


def test_activations_have_a_scale_a_token_and_group() -> None:
    x = torch.tensor([[448.0, -1, 0, 0.5], [0, 0, 3, -6], [0, 0, 0, 0]])
    assert quantise_fp8(x[None], tile=(1, 0))[1][0, :2].tolist() == [[1.0], [torch.tensor(6 / 448).item()]]
    # One scale for the row of 448 keeps -1 and 0.5 exactly; 300 columns end in a group of 44.
    equal("one a token", through_fp8(x)[0], x[0])
    wide = normal((7, 300), "x")
    groups = [through_fp8(wide[:, start : start + 128]) for start in (0, 128, 256)]
    equal("one a group", through_fp8(wide, group=128), torch.cat(groups, 1))
    assert not torch.equal(through_fp8(wide), through_fp8(wide, group=128))
    equal("zeros", through_fp8(x)[2], torch.zeros(4))
    assert through_fp8(x[:0], group=2).shape == (0, 4)


def test_a_static_activation_scale_saturates() -> None:
    x = torch.tensor([[1000.0, 1.0, -0.4]])
    assert through_fp8(x, scale=torch.tensor(0.5)).tolist() == [[224.0, 1.0, -0.40625]]


def test_mxfp4_as_gpt_oss_stores_it_agrees_with_transformers() -> None:
    blocks = (bits((3, 4, 5, 16), "blocks") & 255).to(torch.uint8)
    scale = integers((3, 4, 5), "scales", 254).to(torch.uint8)
    want = convert_moe_packed_tensors(blocks, scale, dtype=torch.float32).transpose(1, 2)
    equal("weight", dequantise_mxfp4(blocks, scale), want)


def test_mxfp4_by_hand() -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x71, 0x9C  # 0.5 6; -2 -0.5
    got = dequantise_mxfp4(blocks, torch.tensor([[[129], [255]]], dtype=torch.uint8))
    assert got[0, 0, :3].tolist() == [2.0, 24.0, 0.0]
    assert got[0, 1].isnan().all()
    got = dequantise_mxfp4(blocks, torch.tensor([[[0], [126]]], dtype=torch.uint8), dtype=D64)
    assert got[0, 0, :2].tolist() == [2.0**-128, 6 * 2.0**-127]
    assert got[0, 1, 30:].tolist() == [-1.0, -0.25]


def test_mxfp4_scales_follow_the_specification() -> None:
    """The largest magnitude's power of two over 4: 7 gives 1, with 7 at 6; 8 gives 2; zeros and tiny ones 2^-127."""
    weight = torch.zeros(1, 4, 32)
    weight[0, 0, 5], weight[0, 1, 5], weight[0, 2, 5] = 7.0, -8.0, 2.0**-140
    blocks, scale = quantise_mxfp4(weight)
    assert scale.flatten().tolist() == [127, 128, 0, 0]
    assert dequantise_mxfp4(blocks, scale)[0, :, 5].tolist() == [6.0, -8.0, 0.0, 0.0]
    assert dequantise_mxfp4(blocks, scale).count_nonzero() == 2


def test_mxfp4_comes_back_exactly_where_codes_hit() -> None:
    blocks = (bits((2, 6, 3, 16), "blocks") & 255).to(torch.uint8)
    blocks[..., 0] = 0x76  # 4 and 6 in each block, which fixes its scale
    scale = integers((2, 6, 3), "scales", 250, 3).to(torch.uint8)
    again, scale_again = quantise_mxfp4(dequantise_mxfp4(blocks, scale, dtype=D64))
    equal("scales", scale_again, scale)
    equal("blocks", again, blocks)


NVFP4_BYTES = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F]
# What compressed-tensors 0.20.0 (nvfp4-pack-quantized) makes of them with scales 1.5, 448 and weight_global_scale 32.
NVFP4_VALUES = [0, 0.0234375, 0.046875, 0.0703125, 0.09375, 0.140625, 0.1875, 0.28125]
NVFP4_VALUES += [-value for value in NVFP4_VALUES]
NVFP4_VALUES += [7, 14, 21, 28, 42, 56, 84, 0, -7, -14, -21, -28, -42, -56, -84, 0]


def test_nvfp4_global_scales_multiply_or_divide_by_their_name() -> None:
    packed = torch.tensor([[NVFP4_BYTES]], dtype=torch.uint8)
    scale = torch.tensor([[[1.5, 448.0]]]).to(E4M3)
    divides = dequantise_nvfp4(packed, scale, weight_global_scale=torch.tensor([[32.0]]))
    assert divides.tolist() == [[NVFP4_VALUES]]
    equal("multiplies", dequantise_nvfp4(packed, scale, weight_scale_2=torch.tensor([[1 / 32]])), divides)


def test_each_half_of_w13_has_its_own_nvfp4_global_scale() -> None:
    experts, rows, cols = 3, 10, 48
    packed = (bits((experts, rows, cols // 2), "packed") & 255).to(torch.uint8)
    scale = codes((experts, rows, cols // 16), "scale")
    whole = torch.tensor([[0.5, 3.0], [1e-4, 7.0], [0.0, 2.5]])
    got = dequantise_nvfp4(packed, scale, weight_scale_2=whole, dtype=D64)
    value = unpack_e2m1(packed)
    for expert in range(experts):
        for row in range(rows):
            factor = whole[expert, row // 5].double()
            block = torch.stack([scale[expert, row, col // 16].double() for col in range(cols)])
            equal(f"row {row}", got[expert, row], value[expert, row] * block * factor)


def test_nvfp4_comes_back_within_half_a_step() -> None:
    weight = normal((2, 6, 64), "weight") * torch.tensor([2.5, 2.0**-60]).reshape(2, 1, 1)
    weight[:, 3:] *= 100
    weight[0, 1, :16] = 0
    packed, scale, whole = quantise_nvfp4(weight, stacked=2)
    got = dequantise_nvfp4(packed, scale, weight_scale_2=whole, dtype=D64)
    unit = (scale.double() * whole.double().repeat_interleave(3, 1)[..., None]).repeat_interleave(16, -1)
    # Half a step of e2m1 is at most 1, between 4 and 6. A block's largest value is 6 before its scale is rounded by
    # at most 1/16, and then at most 6 * 16/15, which is nearer to 6 than 1.
    assert ((got - weight).abs() <= unit).all()
    assert scale.double().reshape(2, 2, 12).amax(-1).eq(448).all()
    assert (whole[:, 1] > 30 * whole[:, 0]).all()


def test_an_nvfp4_block_too_small_for_its_matrix_is_zero() -> None:
    weight = torch.ones(1, 2, 16)
    weight[0, 1] = 2.0**-70
    packed, scale, whole = quantise_nvfp4(weight)
    assert dequantise_nvfp4(packed, scale, weight_scale_2=whole)[0].mean(1).tolist() == [1.0, 0.0]
    assert packed[0, 1].eq(0).all()


@pytest.mark.parametrize(("rows", "cols"), [(128, 4), (130, 5), (7, 3), (300, 9), (256, 8)])
def test_swizzled_scales_lie_where_the_tensor_core_reads_them(rows: int, cols: int) -> None:
    """The position of every scale by the formula of NVIDIA's documentation, every other position 0."""
    scale = (bits((rows, cols), "scale") % 255 + 1).to(torch.uint8)
    tiles_across = -(-cols // 4)
    want = torch.zeros(-(-rows // 128) * 128 * tiles_across * 4, dtype=torch.uint8)
    for r in range(rows):
        for c in range(cols):
            tile = r // 128 * tiles_across + c // 4
            want[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    got = swizzle(scale)
    equal("positions", got.flatten(), want)
    equal("inverse", unswizzle(got, rows, cols), scale)
    both = torch.stack([scale, scale.flip(0)])
    equal("experts", swizzle(both)[1], swizzle(scale.flip(0)))
    equal("experts' inverse", unswizzle(swizzle(both), rows, cols), both)
    assert swizzle(scale.view(E4M3)).dtype == E4M3


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


def test_what_does_not_fit_is_refused() -> None:
    weight, one = codes((2, 6, 8), "weight"), torch.ones(2, 1, 1)
    refused(lambda: dequantise_fp8(weight, torch.ones(2, 6), tile=PER_CHANNEL), "scale", "[2, 6]", "[2, 6, 1]")
    refused(lambda: dequantise_fp8(weight, torch.ones(1, 1, 1), tile=PER_TENSOR), "scale", "[1, 1, 1]")
    refused(lambda: dequantise_fp8(weight, one, tile=PER_TENSOR, stacked=2), "scale", "[2, 2, 1]")
    refused(lambda: dequantise_fp8(weight, one.int(), tile=PER_TENSOR), "scale", "int32")
    refused(lambda: dequantise_fp8(weight.float(), one, tile=PER_TENSOR), "weight", "float32")
    refused(lambda: dequantise_fp8(codes((2, 5, 8), "w"), one, tile=PER_TENSOR, stacked=2), "5 rows", "multiple of 2")
    refused(lambda: quantise_fp8(torch.full((1, 2, 2), torch.nan), tile=PER_TENSOR), "NaN")
    refused(lambda: quantise_fp8(torch.ones(2, 2), tile=PER_TENSOR), "weight", "[2, 2]")

    blocks, scale = torch.zeros(1, 2, 3, 16, dtype=torch.uint8), torch.zeros(1, 2, 3, dtype=torch.uint8)
    refused(lambda: dequantise_mxfp4(blocks.flatten(2), scale), "blocks", "[1, 2, 48]")
    refused(lambda: dequantise_mxfp4(blocks, scale.mT), "scales", "[1, 3, 2]")
    refused(lambda: dequantise_mxfp4(blocks.int(), scale), "blocks", "int32")
    refused(lambda: dequantise_mxfp4(blocks, scale.float()), "scales", "float32")
    refused(lambda: quantise_mxfp4(torch.ones(1, 2, 48)), "48 columns", "32")

    packed, scale, whole = quantise_nvfp4(torch.ones(1, 6, 32))
    refused(lambda: dequantise_nvfp4(packed, scale), "weight_scale_2 missing", "exactly one")
    refused(lambda: dequantise_nvfp4(packed, scale, weight_scale_2=whole, weight_global_scale=whole), "exactly one")
    refused(lambda: dequantise_nvfp4(packed, scale.mT, weight_scale_2=whole), "scale", "[1, 2, 6]")
    refused(lambda: dequantise_nvfp4(packed[..., :12], scale[..., :1], weight_scale_2=whole), "12 bytes")
    refused(lambda: dequantise_nvfp4(packed, scale, weight_scale_2=whole[0]), "weight_scale_2", "[1]")
    refused(lambda: dequantise_nvfp4(packed, scale, weight_scale_2=torch.ones(1, 4)), "6 rows", "multiple of 4")
    refused(lambda: dequantise_nvfp4(packed.int(), scale, weight_scale_2=whole), "packed", "int32")
    refused(lambda: quantise_nvfp4(torch.ones(1, 6, 40)), "40 columns", "16")
    refused(lambda: unswizzle(swizzle(torch.ones(130, 5)), 128, 5), "256 x 8", "128 x 8")


def test_e8m0_and_float_scales_are_told_apart_by_dtype() -> None:
    assert scale_values(torch.tensor([128], dtype=torch.uint8)).item() == 2
    assert scale_values(torch.tensor([128.0], dtype=torch.bfloat16)).item() == 128
