"""The oracle of stored weights, quantised activations and adapters: exact by hand, and sharp at every seam."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import ExpertsInputs, MLPSpec, QuantSpec
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.oracle.quantised import plain_weights
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl.experts import experts
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.stored import CASES

CORE = [case for case in CASES if case.tier != "full"]
NOT_GATED = MLPSpec(1, activation="relu", gated=False)


def bytes_of(*rows: list[int]) -> Tensor:
    return torch.tensor([list(rows)], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("quant", "stored", "want"),
    [
        # The low four bits are the even column; 15 is -1 without zero points.
        (
            QuantSpec("int4", "group", group=2),
            {"w1": bytes_of([0xF7, 0x18]), "scale": [[[0.5, 4]]]},
            [3.5, -0.5, -32, 4],
        ),
        (
            QuantSpec("int4", "channel", zero_points=True),
            {"w1": bytes_of([0xF7, 0x18]), "scale": [[2.0]], "zero_point": [[7]]},
            [0, 16, 2, -12],
        ),
        (QuantSpec("mxfp4", "group", group=32), {"w1": bytes_of([0x91, 0xF7]), "scale": [[[128]]]}, [1, -1, 12, -12]),
        (
            QuantSpec("nvfp4", "group", group=2),
            {"w1": bytes_of([0x91, 0xF7]), "scale": [[[2.0, 0.5]]], "global_scale": [0.25]},
            [0.25, -0.25, 0.75, -0.75],
        ),
    ],
)
def test_codes_are_read_as_their_formats_say(quant: QuantSpec, stored: dict[str, object], want: list[float]) -> None:
    dtype = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(quant.format, torch.float32)
    tensors = {"experts.w1": stored["w1"], "experts.w1.scale": torch.tensor(stored["scale"]).to(dtype)}
    for part in ("zero_point", "global_scale"):
        if part in stored:
            tensors[f"experts.w1.{part}"] = torch.tensor(stored[part])
    w2 = {f"{name.replace('w1', 'w2')}": tensor for name, tensor in tensors.items()}
    found = plain_weights(quant, replace(NOT_GATED, width=4), {**tensors, **w2}, 4)
    assert found["experts.w1"].flatten().tolist() == want


def test_tiles_of_up_begin_at_its_own_first_row() -> None:
    quant = QuantSpec("int8", "block", block=(2, 4), split_gate_up=True)
    tensors = {
        "experts.w13": torch.ones(1, 6, 4, dtype=torch.int8),
        "experts.w13.scale": torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]),
        "experts.w2": torch.ones(1, 4, 3, dtype=torch.int8),
        "experts.w2.scale": torch.tensor([[[5.0], [6.0]]]),
    }
    found = plain_weights(quant, MLPSpec(3), tensors, 4)
    assert found["experts.w13"][0, :, 0].tolist() == [1, 1, 2, 3, 3, 4]
    assert found["experts.w2"][0, :, 0].tolist() == [5, 5, 6, 6]


def test_only_what_is_near_the_middle_of_two_codes_may_go_to_either() -> None:
    value = Value.of(torch.tensor([1.25, 1.5, 1.5 + 1e-9, 1.6])).stored(torch.float32)
    codes = value.snapped(torch.round)
    assert codes.exact.tolist() == [1, 2, 2, 2]
    assert codes.limit.tolist() == [0, 1, 1, 0]


def share(got: Tensor, inputs: ExpertsInputs, want: Tensor, limit: Tensor) -> float:
    assert got.dtype == inputs.x.dtype
    return float(((got.double() - want).abs() / limit).max())


@pytest.mark.parametrize("case", CORE, ids=lambda case: case.id)
def test_the_reference_is_within_half_the_bound_and_a_neighbours_scale_beyond(case: Case) -> None:
    inputs = inputs_of(case)
    want, bound = expected_experts(inputs)
    assert share(experts(inputs), inputs, want, bound.limit) < 0.5
    chosen = int(inputs.ids.flatten()[inputs.weights.abs().masked_fill(inputs.ids < 0, -1).argmax()])
    for name in inputs.tensors if inputs.quant else ():
        tensor = inputs.tensors[name]
        if not name.endswith(("scale", "zero_point")) or name.endswith("input_scale"):
            continue
        for dim in (dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1):
            wrong = tensor.clone()
            raw = wrong.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else wrong
            last = -1 if dim else chosen  # another expert's scales say nothing
            raw.select(dim, last).copy_(raw.select(dim, last - 1))
            got = experts(replace(inputs, tensors={**inputs.tensors, name: wrong}))
            assert share(got, inputs, want, bound.limit) > 50, (name, dim)
