"""float8 weights: each code its value, each tile its own scale."""

from __future__ import annotations

import torch
from kernel_twins.expert_cases import DTYPES, TILES, dispatched_of, ids_of, same_sum, share_of, weights_of

from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poisoned_allocations
from moe_conformance.kernels import experts, grouped_matmul
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8


def test_float8_weights_are_scaled_tile_by_tile(device: str) -> None:
    """128 x 128 blocks cut at the seam of gate and up, per channel, and small tiles; activations in two dtypes."""
    for gated, tile, hidden, width in (
        (True, (128, 128), 200, 160),
        (False, (128, 128), 130, 72),
        (True, (1, 0), 40, 37),
        (True, (16, 32), 72, 40),
        (True, (24, 48), 100, 60),
        (True, (0, 0), 40, 37),
    ):
        spec, count = MLPSpec(width, gated=gated), 3
        plain = weights_of(spec, hidden, count, torch.float32)
        # Scales of neighbouring tiles differ, those of experts too.
        stacked = {"experts.w13": 2, "experts.w1": 1, "experts.w2": 1}
        codes, exact, quantised = {}, {}, {}
        for name, tensor in plain.items():
            rows = torch.arange(tensor.shape[1])[:, None] // 16 + torch.arange(tensor.shape[2]) // 16
            tensor = tensor * torch.exp2((rows % 5).float()) * torch.arange(1, count + 1)[:, None, None]
            codes[name], scale = quantise_fp8(tensor, tile=tile, stacked=stacked[name])
            exact[name] = dequantise_fp8(codes[name], scale, tile=tile, stacked=stacked[name], dtype=torch.float64)
            quantised[name.removeprefix("experts.")] = Quantised(scale.to(device), tile)
        for dtype in (torch.float32, torch.bfloat16):
            x = normal((7, hidden), "x", dtype, 0.125)
            ids, share = ids_of(7, 2, count, dropped=False), share_of(7, 2)
            with poisoned_allocations():
                got = experts.routed_experts(
                    x.to(device),
                    spec,
                    {n: t.to(device) for n, t in codes.items()},
                    ids.to(device),
                    share.to(device),
                    quantised=quantised,
                )
            same_sum(f"tile {tile}, {dtype}", got, x, spec, exact, ids, share)


def test_every_float8_code_has_its_value(device: str) -> None:
    """All 256 codes as weights of one term, subnormals and NaN among them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = torch.zeros(1, 256, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w.view(torch.uint8)[0, :, 0] = torch.arange(256, dtype=torch.uint8)
    for dtype in DTYPES:
        x = torch.zeros(1, 16, dtype=dtype)
        x[0, 0] = 1
        dispatched = dispatched_of(torch.zeros(1, 1, dtype=torch.int64), 1, 16, True, device)
        scale = Quantised(torch.full((1, 1, 1), 2.0, device=device), (0, 0))
        got = grouped_matmul.down(x.to(device), w.to(device), dispatched, TILES["many tiles"], quantised=scale)
        compare.equal(f"codes in {dtype}", got[0].float(), 2 * every.float())
