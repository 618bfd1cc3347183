"""Integer weights: every code, zero point, scale and group of GPTQ, AWQ, int8 and pack-quantized is in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging.compare import equal
from moe_conformance.judging.inputs import bits as hashed
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.reference_impl.quantised.gptq import (
    dequantise_awq,
    dequantise_gptq,
    quantise_awq,
    quantise_gptq,
)
from moe_conformance.reference_impl.quantised.integers import (
    dequantise_int8,
    dequantise_packed,
    pack,
    quantise_int8,
    quantise_packed,
    unpack,
)
from moe_conformance.reference_impl.quantised.tiles import spread

D64 = torch.float64
Format = Literal["gptq", "gptq_v2"]


def words(*values: int) -> Tensor:
    """int32 of the same bits."""
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


def nibble(word: Tensor, place: int, bits: int = 4) -> int:
    return (int(word) >> place * bits) % 2**bits


def act_order(experts: int, cols: int, groups: int) -> Tensor:
    """A group for each column, each group equally often, in no order, another one in each expert."""
    shuffled = [integers((cols,), f"expert{e}", 9973).argsort() % groups for e in range(experts)]
    return torch.stack(shuffled).int()


# qweight of two words a column, groups of 8 in the order of G_IDX, and what AutoGPTQ 0.7.1 (qlinear_cuda) makes of it.
G_IDX = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0]
AUTOGPTQ = {
    0: [-1, -7.875, -6.75, -0.625, -0.5, -3.375, -0.25, -1.125, -9, -0.75, -4.5, -0.25, 0, 2.25, 4.5, 0.75],
    3: [-1, -13.5, -12, 0.5, -0.5, -12, 0.5, -9, -15, 0, -9, 2, 1.5, -4.5, -1.5, 4.5],
    7: [6, -2, 0, 9, 3, -8, 5, -4, -4, 8, 4, 12, 7, 2, 6, 13],
}


def test_gptq_with_act_order_is_what_autogptq_computes() -> None:
    qweight = torch.stack([words(*((0x76543210 * (k + 1) + 0x1111 * row) for row in range(8))) for k in range(2)])
    got = dequantise_gptq(
        qweight[None],
        (torch.arange(1, 17).float() / 8).reshape(1, 2, 8),
        qzeros=torch.stack([words(0x01234567), words(0x89ABCDE7)])[None],
        group=8,
        checkpoint_format="gptq",
        desc_act=True,
        g_idx=torch.tensor([G_IDX]),
    )
    assert {row: got[0, row].tolist() for row in AUTOGPTQ} == AUTOGPTQ


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_gptq_code_meets_the_zero_and_scale_of_its_group(
    checkpoint_format: Format, ordered: bool, bits: int
) -> None:
    """Every element by itself: 2 experts, 48 inputs in 3 groups, 16 outputs."""
    experts, cols, rows, group = 2, 48, 16, 16
    per_word, plus = 32 // bits, int(checkpoint_format == "gptq")
    qweight = (hashed((experts, cols // per_word, rows), "qweight") & 2**32 - 1).to(torch.int32)
    stored = integers((experts, cols // group, rows), "zeros", 2**bits - 1)
    qzeros = pack(stored, 2, bits)
    scales = normal((experts, cols // group, rows), "scales", torch.float16)
    g_idx = act_order(experts, cols, cols // group) if ordered else None
    want = torch.empty(experts, rows, cols, dtype=D64)
    for e in range(experts):
        for c in range(cols):
            g = int(g_idx[e, c]) if g_idx is not None else c // group
            for r in range(rows):
                code = nibble(qweight[e, c // per_word, r], c % per_word, bits)
                zero = nibble(qzeros[e, g, r // per_word], r % per_word, bits) + plus
                want[e, r, c] = (code - zero) * scales[e, g, r].double()
    got = dequantise_gptq(
        qweight,
        scales,
        qzeros=qzeros,
        group=group,
        checkpoint_format=checkpoint_format,
        desc_act=ordered,
        g_idx=g_idx,
        bits=bits,
        dtype=D64,
    )
    equal("weight", got, want)


def test_awq_nibbles_hold_outputs_0_2_4_6_1_3_5_7() -> None:
    got = dequantise_awq(words(0x76543210)[None, None], torch.ones(1, 1, 8), qzeros=words(0)[None, None], group=1)
    assert got[0, :, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    zeros = dequantise_awq(words(0)[None, None], torch.ones(1, 1, 8), qzeros=words(0x76543210)[None, None], group=1)
    assert zeros[0, :, 0].tolist() == [0, -4, -1, -5, -2, -6, -3, -7]


def test_awq_is_what_autoawq_computes() -> None:
    """AutoAWQ 0.2.9, dequantize_gemm."""
    qweight = torch.stack([words(0x76543210), words(0x0FEDCBA9), words(0x13579BDF), words(0xF0E1D2C3)])
    got = dequantise_awq(
        qweight[None],
        (torch.arange(1, 17).float() / 8).reshape(1, 2, 8),
        qzeros=torch.stack([words(0x01234567), words(0x89ABCDEF)])[None],
        group=2,
    )
    assert got[0].tolist() == [
        [-0.875, 0.25, 0.0, -13.5],
        [0.25, 2.5, -5.0, -12.5],
        [-1.875, 1.5, -1.375, -2.75],
        [1.5, 6.0, -7.5, 6.0],
        [-1.875, 3.75, -3.25, -17.875],
        [3.75, 10.5, -10.5, -15.75],
        [-0.875, 7.0, -5.625, 1.875],
        [7.0, 0.0, -14.0, 14.0],
    ]


def test_pack_quantized_is_what_compressed_tensors_computes() -> None:
    """compressed-tensors 0.20.0: 9 x 10 weights in groups of 5, so that no word is full, zero points along rows."""
    rows = [words(0x76543210, 0xBA), words(0xFEDCBA98, 0x21), words(0x13579BDF, 0x43)] * 3
    scale = [[1, 2.5], [3, 0.5], [0.25, 4], [1, 2.5], [3, 0.5], [0.25, 4], [1, 2.5], [3, 0.5], [0.125, 8]]
    got = dequantise_packed(
        torch.stack(rows)[None],
        torch.tensor([scale]),
        weight_shape=torch.tensor([9, 10]),
        weight_zero_point=torch.stack([words(0x654329A7, 0x12345586), words(11, 4)])[None],
        group=5,
    )
    assert got[0].tolist() == [
        [-7.0, -6.0, -5.0, -4.0, -3.0, -2.5, 0.0, 2.5, 10.0, 12.5],
        [-6.0, -3.0, 0.0, 3.0, 6.0, 2.5, 3.0, 3.5, -3.5, -3.0],
        [1.5, 1.0, 0.5, 0.0, -0.5, 0.0, -8.0, -16.0, -8.0, -4.0],
        [-2.0, -1.0, 0.0, 1.0, 2.0, 0.0, 2.5, 5.0, 12.5, 15.0],
        [15.0, 18.0, 21.0, 24.0, 27.0, 4.5, 5.0, 5.5, -1.5, -1.0],
        [2.75, 2.25, 1.75, 1.25, 0.75, 8.0, 0.0, -8.0, 0.0, 4.0],
        [-5.0, -4.0, -3.0, -2.0, -1.0, 7.5, 10.0, 12.5, 20.0, 22.5],
        [6.0, 9.0, 12.0, 15.0, 18.0, 6.0, 6.5, 7.0, 0.0, 0.5],
        [0.5, 0.25, 0.0, -0.25, -0.5, 8.0, -8.0, -24.0, -8.0, 0.0],
    ]


def test_pack_quantized_without_zero_points_is_centred() -> None:
    got = dequantise_packed(words(0x76543210)[None, None], torch.tensor([[[2.5]]]), weight_shape=(1, 8), group=-1)
    assert got.flatten().tolist() == [-20, -17.5, -15, -12.5, -10, -7.5, -5, -2.5]


def test_each_half_of_w13_has_words_of_its_own_for_zero_points() -> None:
    """5 rows a half: the second half's zero points begin a word, they do not go on in the first half's."""
    halves = [normal((2, 5, 16), f"half{half}") for half in range(2)]
    parts = [quantise_packed(half, group=8) for half in halves]
    packed, scale, zero = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    got = dequantise_packed(packed, scale, weight_shape=(10, 16), weight_zero_point=zero, group=8, stacked=2)
    for index, (p, s, z) in enumerate(parts):
        want = dequantise_packed(p, s, weight_shape=(5, 16), weight_zero_point=z, group=8)
        equal(f"half {index}", got[:, 5 * index : 5 * index + 5], want)
    fused = quantise_packed(torch.cat(halves, 1), group=8, stacked=2)
    for name, mine, want in zip(("packed", "scale", "zero point"), fused, (packed, scale, zero), strict=True):
        equal(name, mine, want)


WEIGHT = normal((3, 16, 48), "weight") * torch.tensor([2.5, 2.0**-6, 1.0]).reshape(3, 1, 1)
WEIGHT[:, :, :20] += 1  # groups whose zero is not in the middle
WEIGHT[:, 0], WEIGHT[:, 1] = 0, WEIGHT[:, 1].abs()


def came_back(got: Tensor, zeros_at_least_one: bool = False) -> None:
    """Within a step of the group's own scale: half of it from rounding a code, half from rounding the zero point.

    Where the zero cannot be 0, a group without negative values loses one step more at its top.
    """
    low, high = (WEIGHT.double().reshape(3, 16, 3, 16).sort(-1).values[..., end] for end in (0, -1))
    step = (high.clamp(min=0) - low.clamp(max=0)) / 15 * (1 + 2**-10) + 2**-14  # as float16 rounds a scale
    steps = 1 + zeros_at_least_one
    error = (got.double() - WEIGHT.double()).abs().reshape(3, 16, 3, 16).amax(-1)
    assert (error <= steps * step).all()
    assert got.unique().numel() > 600  # not all of one group's few values


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_comes_back_within_a_step(checkpoint_format: Format) -> None:
    found = quantise_gptq(WEIGHT, group=16, checkpoint_format=checkpoint_format)
    got = dequantise_gptq(
        found.qweight, found.scales, qzeros=found.qzeros, group=16, checkpoint_format=checkpoint_format
    )
    came_back(got, zeros_at_least_one=checkpoint_format == "gptq")


def test_gptq_groups_follow_g_idx_when_quantising() -> None:
    """Columns with the same group are put side by side: the same codes as without act-order."""
    g_idx = act_order(3, 48, 3)
    order = g_idx.argsort(dim=1, stable=True)
    side_by_side = WEIGHT.gather(2, order[:, None].expand_as(WEIGHT))
    found = quantise_gptq(WEIGHT, group=16, checkpoint_format="gptq_v2", g_idx=g_idx)
    plain = quantise_gptq(side_by_side, group=16, checkpoint_format="gptq_v2")
    equal("g_idx", found.g_idx, g_idx)
    equal("scales", found.scales, plain.scales)
    equal("qzeros", found.qzeros, plain.qzeros)
    codes, wanted = unpack(found.qweight, 1).mT, unpack(plain.qweight, 1).mT
    equal("codes", codes.gather(2, order[:, None].expand_as(codes)), wanted)


def test_awq_and_pack_quantized_come_back_within_a_step() -> None:
    qweight, scales, qzeros = quantise_awq(WEIGHT, group=16)
    came_back(dequantise_awq(qweight, scales, qzeros=qzeros, group=16))
    packed, scale, zero = quantise_packed(WEIGHT, group=16)
    came_back(dequantise_packed(packed, scale, weight_shape=(16, 48), weight_zero_point=zero, group=16))


def test_pack_quantized_columns_may_have_groups_in_any_order() -> None:
    g_idx = act_order(3, 48, 3)
    packed, scale, zero = quantise_packed(WEIGHT, group=16, g_idx=g_idx)
    got = dequantise_packed(
        packed, scale, weight_shape=(16, 48), weight_zero_point=zero, group=16, weight_g_idx=g_idx, dtype=D64
    )
    for e in range(3):
        for c in range(48):
            code = torch.tensor([nibble(packed[e, r, c // 8], c % 8) for r in range(16)])
            zeros = torch.tensor([nibble(zero[e, r // 8, g_idx[e, c]], r % 8) for r in range(16)])
            equal(f"{e}, {c}", got[e, :, c], (code - zeros) * scale[e, :, g_idx[e, c]].double())


@pytest.mark.parametrize(("tile", "stacked", "shape"), [((1, 0), 1, (3, 16, 1)), ((0, 0), 2, (3, 2, 1))])
def test_int8_is_symmetric_and_comes_back_within_half_a_step(
    tile: tuple[int, int], stacked: int, shape: tuple[int, ...]
) -> None:
    codes, scale = quantise_int8(WEIGHT, tile=tile, stacked=stacked)
    assert scale.shape == shape and codes.abs().max() == 127
    got = dequantise_int8(codes, scale, tile=tile, stacked=stacked, dtype=D64)
    unit = spread(scale, WEIGHT.shape, tile, stacked)
    assert ((got - WEIGHT).abs() <= unit / 2 * (1 + 1e-6)).all()
    equal("by hand", got[2, 9], codes[2, 9].double() * scale[2, 9 if stacked == 1 else 1].double())


def test_int8_rounds_ties_to_even() -> None:
    codes, scale = quantise_int8(torch.tensor([[[127.0, 0.5, 1.5, -2.5, -127]]]))
    assert codes.flatten().tolist() == [127, 0, 2, -2, -127] and scale.item() == 1


@pytest.mark.parametrize(("bits", "count"), [(2, 21), (3, 21), (4, 21), (7, 40), (8, 21), (4, 16)])
def test_words_fill_from_the_lowest_bits(bits: int, count: int) -> None:
    codes = integers((2, count, 3), "codes", 2**bits)
    packed = pack(codes, 1, bits)
    assert packed.dtype == torch.int32 and packed.shape[1] == -(-count * bits // 32)
    equal("codes", unpack(packed, 1, bits)[:, :count], codes)
    assert unpack(packed, 1, bits)[:, count:].eq(0).all()
    stream = sum(int(word) % 2**32 << 32 * at for at, word in enumerate(packed[1, :, 2]))
    assert [stream >> bits * at & 2**bits - 1 for at in range(count)] == codes[1, :, 2].tolist()


def refused(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert all(part in str(raised.value) for part in parts), raised.value


def test_what_does_not_fit_is_refused() -> None:
    found = quantise_gptq(WEIGHT, group=16, checkpoint_format="gptq")
    good: dict[str, Any] = {
        "qweight": found.qweight,
        "scales": found.scales,
        "qzeros": found.qzeros,
        "group": 16,
        "checkpoint_format": "gptq",
    }

    def gptq(**changed: Any) -> Callable[[], Tensor]:
        return lambda: dequantise_gptq(**(good | changed))

    refused(gptq(desc_act=True), "g_idx", "None")
    refused(gptq(g_idx=found.g_idx[:, :40]), "g_idx", "[3, 40]")
    refused(gptq(g_idx=found.g_idx + 1), "g_idx", "1 to 3", "0 to 2")
    refused(gptq(g_idx=found.g_idx - 1), "g_idx", "-1 to 1")
    refused(lambda: unpack(found.qweight, 1, 9), "bits", "9", "2 to 8")
    refused(lambda: pack(torch.zeros(1, 8), 1, 1), "bits", "1")
    refused(gptq(group=20), "group", "20", "48")
    refused(gptq(group=0), "group", "0")
    refused(gptq(group=-1), "scales", "[3, 3, 16]", "[3, 1, 16]")
    refused(gptq(qweight=found.qweight.long()), "qweight", "int64")
    refused(gptq(qzeros=found.qzeros[:, :2]), "qzeros", "[3, 2, 2]")
    refused(gptq(scales=found.scales.mT), "scales", "[3, 16, 3]")
    refused(gptq(qzeros=words(0xF1111111, 1).expand(3, 3, 2)), "qzeros", "15", "gptq_v2")
    refused(lambda: quantise_gptq(WEIGHT[:, :12], group=16, checkpoint_format="gptq"), "dim 1", "8")
    refused(lambda: quantise_gptq(WEIGHT[:, :, :44], group=11, checkpoint_format="gptq"), "dim 2", "8")

    qweight, scales, qzeros = quantise_awq(WEIGHT, group=16)
    refused(lambda: dequantise_awq(qweight, scales, qzeros=qzeros, group=32), "group", "32")
    refused(lambda: dequantise_awq(qweight, scales.mT, qzeros=qzeros, group=16), "scales")
    refused(lambda: dequantise_awq(qweight, scales, qzeros=qzeros[:, :1], group=16), "qzeros", "[3, 1, 2]")
    refused(lambda: dequantise_awq(qweight.long(), scales, qzeros=qzeros, group=16), "qweight", "int64")
    refused(lambda: quantise_awq(WEIGHT[:, :12], group=16), "dim 1")

    packed, scale, zero = quantise_packed(WEIGHT, group=16)

    def unpacked(**changed: Any) -> Callable[[], Tensor]:
        values: dict[str, Any] = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zero}
        return lambda: dequantise_packed(**(values | {"weight_shape": (16, 48), "group": 16} | changed))

    refused(unpacked(weight_shape=(48, 16)), "weight_packed", "[3, 16, 6]", "[3, 48, 2]")
    refused(unpacked(weight_packed=packed[:2]), "weight_packed", "[2, 16, 6]")
    refused(unpacked(weight_scale=scale[..., :2]), "weight_scale", "[3, 16, 2]")
    refused(unpacked(weight_zero_point=zero.mT), "weight_zero_point", "[3, 3, 2]")
    refused(unpacked(weight_zero_point=zero.long()), "weight_zero_point", "int64")
    refused(unpacked(group=9), "group", "9")

    refused(lambda: dequantise_int8(torch.ones(1, 2, 2), torch.ones(1, 2, 1)), "weight", "float32")
    refused(lambda: dequantise_int8(torch.ones(1, 2, 2, dtype=torch.int8), torch.ones(1, 2)), "scale", "[1, 2]")


def test_one_group_for_all_columns() -> None:
    qweight, scales, qzeros = quantise_awq(WEIGHT, group=-1)
    equal(
        "weight",
        dequantise_awq(qweight, scales, qzeros=qzeros, group=-1),
        dequantise_awq(qweight, scales, qzeros=qzeros, group=48),
    )
