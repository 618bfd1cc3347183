"""float8 weights: each code its value, each tile its own scale."""

from __future__ import annotations

import pytest
import torch
from kernel_twins.expert_cases import DTYPES, TILES, dispatched_of, ids_of, same_sum, share_of, weights_of
from kernel_twins.stored import stored_and_exact
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, MLPSpec, QuantSpec
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poisoned_allocations
from moe_conformance.kernels import experts, grouped_matmul
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8

# Blocks cut at the seam of gate and up, per channel and matrix, and small tiles that divide nothing.
TILED = (
    (True, (128, 128), 200, 160),
    (False, (128, 128), 130, 72),
    (True, (1, 0), 40, 37),
    (True, (16, 32), 72, 40),
    (True, (24, 48), 100, 60),
    (True, (0, 0), 40, 37),
)
activations = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def uneven(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales of neighbouring tiles differ, those of experts too."""
    found = {}
    for name, tensor in tensors.items():
        rows = torch.arange(tensor.shape[1])[:, None] // 16 + torch.arange(tensor.shape[2]) // 16
        found[name] = tensor * torch.exp2((rows % 5).float()) * torch.arange(1, len(tensor) + 1)[:, None, None]
    return found


@activations
@pytest.mark.parametrize("gated, tile, hidden, width", TILED, ids=str)
def test_float8_weights_are_scaled_tile_by_tile(
    device: str, gated: bool, tile: tuple[int, int], hidden: int, width: int, dtype: torch.dtype
) -> None:
    spec, count = MLPSpec(width, gated=gated), 3
    stacked = {"experts.w13": 2, "experts.w1": 1, "experts.w2": 1}
    codes, exact, quantised = {}, {}, {}
    for name, tensor in uneven(weights_of(spec, hidden, count, torch.float32)).items():
        codes[name], scale = quantise_fp8(tensor, tile=tile, stacked=stacked[name])
        exact[name] = dequantise_fp8(codes[name], scale, tile=tile, stacked=stacked[name], dtype=torch.float64)
        quantised[name.removeprefix("experts.")] = Quantised(scale.to(device), tile)
    x, ids, share = normal((7, hidden), "x", dtype, 0.125), ids_of(7, 2, count, dropped=False), share_of(7, 2)
    on = {n: t.to(device) for n, t in codes.items()}
    with poisoned_allocations():
        got = experts.routed_experts(x.to(device), spec, on, ids.to(device), share.to(device), quantised=quantised)
    same_sum("sum", got, x, spec, exact, ids, share)


# Widths that no tile divides, so that a block goes over the seam of gate and up.
STORED = {
    "one a matrix": QuantSpec("fp8_e4m3", "tensor"),
    "one each for gate and up": QuantSpec("fp8_e4m3", "tensor", split_gate_up=True),
    "one a row": QuantSpec("fp8_e4m3", "channel"),
    "blocks": QuantSpec("fp8_e4m3", "block", block=(16, 32)),
    "groups": QuantSpec("fp8_e4m3", "group", group=16),
}


@activations
@pytest.mark.parametrize("bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize("gated", (True, False), ids=("gate", "no gate"))
@pytest.mark.parametrize("what", STORED)
def test_stored_weights_are_what_their_scales_say(
    device: str, what: str, gated: bool, bias: bool, dtype: torch.dtype
) -> None:
    quant, spec, hidden, count = STORED[what], MLPSpec(60, gated=gated, bias=bias), 72, 3
    plain = weights_of(spec, hidden, count, torch.float32)
    matrices = {name: tensor for name, tensor in plain.items() if ".w" in name}
    biases = {name: tensor.to(dtype) for name, tensor in plain.items() if ".b" in name}
    stored, exact = stored_and_exact(quant, spec, uneven(matrices))
    x, ids, share = normal((7, hidden), "x", dtype, 0.125), ids_of(7, 2, count, dropped=True), share_of(7, 2)
    on = {n: t.to(device) for n, t in (biases | stored).items()}
    with poisoned_allocations():
        got = experts.experts(ExpertsInputs(x.to(device), spec, on, ids.to(device), share.to(device), quant=quant))
    same_sum("sum", got, x, spec, biases | exact, ids, share)


@pytest.mark.parametrize("quant, words", (
    (QuantSpec("int8", "channel"), "int8"),
    (QuantSpec("mxfp4", "group", group=32), "mxfp4"),
    (QuantSpec("fp8_e4m3", "block", zero_points=True), "zero points"),
    (QuantSpec("fp8_e4m3", "block", activations="token"), "token"),
    (QuantSpec("fp8_e4m3", "group", group=24), "24 .* 16"),
), ids=lambda value: value.format if isinstance(value, QuantSpec) else value)  # fmt: skip
def test_other_codes_are_unsupported(device: str, quant: QuantSpec, words: str) -> None:
    tensors = {f"experts.{part}.scale": torch.ones(3, 1, 1) for part in ("w13", "w2")}
    ids, share = ids_of(7, 2, 3, dropped=False), share_of(7, 2)
    with pytest.raises(Unsupported, match=words):
        experts.experts(ExpertsInputs(torch.zeros(7, 64), MLPSpec(64), tensors, ids, share, quant=quant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float8_code_has_its_value(device: str, dtype: torch.dtype) -> None:
    """All 256 codes as weights of one term, subnormals and NaN among them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = torch.zeros(1, 256, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w.view(torch.uint8)[0, :, 0] = torch.arange(256, dtype=torch.uint8)
    x = torch.zeros(1, 16, dtype=dtype)
    x[0, 0] = 1
    dispatched = dispatched_of(torch.zeros(1, 1, dtype=torch.int64), 1, 16, True, device)
    scale = Quantised(torch.full((1, 1, 1), 2.0, device=device), (0, 0))
    got = grouped_matmul.down(x.to(device), w.to(device), dispatched, TILES["many tiles"], quantised=scale)
    compare.equal("codes", got[0].float(), 2 * every.float())
