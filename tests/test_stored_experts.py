"""Experts by QuantSpec: every weight by the words of the spec, and what becomes of activations on their way in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import ExpertsInputs, MLPSpec, QuantSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.judging.inputs import bits, integers, normal
from moe_conformance.reference_impl.experts import experts, routed_experts
from moe_conformance.reference_impl.quantised.experts import dequantised
from moe_conformance.reference_impl.quantised.fp8 import through_fp8
from moe_conformance.reference_impl.quantised.integers import through_int8

D64 = torch.float64
EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 3, 22, 14, 6, 2
SPEC = MLPSpec(WIDTH, bias=True)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]

# Blocks and groups divide neither the 28 rows of w13, nor the 14 of gate, nor the 22 and 14 columns.
QUANTS = {
    "fp8-tensor": QuantSpec("fp8_e4m3", "tensor"),
    "fp8-tensor-halves": QuantSpec("fp8_e4m3", "tensor", split_gate_up=True),
    "fp8-channel": QuantSpec("fp8_e4m3", "channel"),
    "fp8-block": QuantSpec("fp8_e4m3", "block", block=(8, 5)),
    "int8-channel": QuantSpec("int8", "channel"),
    "int8-zero-points": QuantSpec("int8", "group", group=8, zero_points=True),
    "int4-group": QuantSpec("int4", "group", group=8),
    "int4-zero-points": QuantSpec("int4", "channel", zero_points=True),
    "mxfp4": QuantSpec("mxfp4", "group", group=8),
    "nvfp4": QuantSpec("nvfp4", "group", group=16),
}
quants = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)


def stored(quant: QuantSpec, spec: MLPSpec = SPEC) -> dict[str, Tensor]:
    """Codes of every sign and size, and scales that differ from tile to tile."""
    found = {}
    for name, shape in quant.tensors("experts", spec, HIDDEN, (EXPERTS,)).items():
        positive = normal(shape, name).abs() / 8 + 0.1
        match name.split(".")[1:], quant.format:
            case [_, "scale"], "mxfp4":
                found[name] = integers(shape, name, 128, 122).to(torch.uint8)
            case [_, "scale"], "nvfp4":
                found[name] = positive.to(torch.float8_e4m3fn)
            case [_, "zero_point"], _:
                found[name] = integers(shape, name, 16).to(torch.uint8)
            case [_, _], _:
                found[name] = positive
            case ["b13" | "b2" | "output_norm"], _:
                found[name] = normal(shape, name)
            case _, "fp8_e4m3":
                found[name] = normal(shape, name).to(torch.float8_e4m3fn)
            case _, "int8":
                found[name] = integers(shape, name, 128, -128).to(torch.int8)
            case _:
                found[name] = (bits(shape, name) & 255).to(torch.uint8)
    return found


def weight(quant: QuantSpec, tensors: dict[str, Tensor], name: str, expert: int, row: int, column: int) -> float:
    """One weight by the words of QuantSpec."""
    value = float(tensors[name][expert, row, column if quant.format in ("fp8_e4m3", "int8") else column // 2])
    if quant.format in ("int4", "mxfp4", "nvfp4"):
        nibble = int(value) >> 4 * (column % 2) & 15
        signed = nibble if quant.zero_points or nibble < 8 else nibble - 16
        value = signed if quant.format == "int4" else E2M1[nibble]
    at: tuple[int, ...] = {
        "tensor": (expert,),
        "channel": (expert, row),
        "block": (expert, row // quant.block[0], column // quant.block[1]),
        "group": (expert, row, column // max(quant.group, 1)),
    }[quant.granularity]
    if quant.split_gate_up and name == "experts.w13":
        at = (expert, row // WIDTH)
    if quant.zero_points:
        value -= float(tensors[f"{name}.zero_point"][at])
    scale = float(tensors[f"{name}.scale"][at])
    value *= 2 ** (scale - 127) if quant.format == "mxfp4" else scale
    return value * float(tensors[f"{name}.global_scale"][expert]) if quant.format == "nvfp4" else value


@quants
def test_every_weight_is_its_code_less_its_zero_point_times_its_scale(quant: QuantSpec) -> None:
    tensors = stored(quant)
    got = dequantised(quant, SPEC, tensors, HIDDEN, D64)
    assert list(got) == list(SPEC.tensors("experts", HIDDEN))
    for name, shape in SPEC.tensors("experts", HIDDEN, (EXPERTS,)).items():
        if ".b" in name:
            assert got[name] is tensors[name]
            continue
        cells = itertools.product(*map(range, shape))
        want = torch.tensor([weight(quant, tensors, name, *cell) for cell in cells], dtype=D64).reshape(shape)
        torch.testing.assert_close(got[name], want, rtol=1e-14, atol=0)
        assert len(want.unique()) > 10


def inputs(quant: QuantSpec, spec: MLPSpec = SPEC, dtype: torch.dtype = D64) -> ExpertsInputs:
    """Routing with an expert that nobody picks, and dropped pairs."""
    ids = torch.stack([torch.tensor([0, 2, -1])[integers((3,), f"row{t}", 997).argsort()] for t in range(TOKENS)])
    x, weights = normal((TOKENS, HIDDEN), "x", dtype), normal((TOKENS, TOP_K), "weights", D64) * 2.5
    return ExpertsInputs(x, spec, stored(quant, spec), ids[:, :TOP_K], weights, quant=quant)


def near(got: Tensor, want: Tensor) -> None:
    """Both are float64 sums of the same few dozen products in another order."""
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        MLPSpec(WIDTH, "relu2", gated=False),
        MLPSpec(WIDTH, clamp="before", limit=0.5, alpha=1.702, up_offset=1.0, bias=True),
        MLPSpec(WIDTH, "gelu_tanh", weight_on="input", output_norm=0.25),
        MLPSpec(WIDTH, weight_on="w2_input"),
    ],
    ids=["bias", "not-gated", "gpt-oss", "input", "w2-input"],
)
@quants
def test_stored_experts_compute_as_those_they_stand_for(quant: QuantSpec, spec: MLPSpec) -> None:
    given = inputs(quant, spec)
    plain = dequantised(quant, spec, dict(given.tensors), HIDDEN, D64)
    near(experts(given), routed_experts(given.x, spec, plain, given.ids, given.weights))


def test_weights_are_not_rounded_to_the_dtype_of_x() -> None:
    """1 + 2^-9 is 1 in bfloat16, and the difference to 1 would be lost."""
    quant, spec = QuantSpec("int8", "group", group=1), MLPSpec(1, "relu", gated=False)
    tensors = {
        "experts.w1": torch.ones(1, 1, 2, dtype=torch.int8),
        "experts.w1.scale": torch.tensor([[[1 + 2.0**-9, 1.0]]]),
        "experts.w2": torch.ones(1, 2, 1, dtype=torch.int8),
        "experts.w2.scale": torch.ones(1, 2, 1),
    }
    x, ids = torch.tensor([[1.0, -1.0]]).bfloat16(), torch.tensor([[0]])
    got = experts(ExpertsInputs(x, spec, tensors, ids, torch.ones(1, 1), quant=quant))
    assert (got.dtype, got.tolist()) == (torch.bfloat16, [[2.0**-9] * 2])


def by_loops(given: ExpertsInputs, between: Callable[[Tensor, str, int], Tensor]) -> Tensor:
    """The sum pair by pair of dequantised weights; between: what happens to the input of a projection."""
    assert given.quant is not None
    t = dequantised(given.quant, given.mlp, dict(given.tensors), HIDDEN, D64)
    total = torch.zeros_like(given.x)
    for token, slot in itertools.product(range(TOKENS), range(TOP_K)):
        expert = int(given.ids[token, slot])
        if expert >= 0:
            row = between(given.x[token, None], "w13", expert)
            gate, up = (row @ t["experts.w13"][expert].T + t["experts.b13"][expert]).chunk(2, -1)
            hidden = between(F.silu(gate) * up, "w2", expert) @ t["experts.w2"][expert].T + t["experts.b2"][expert]
            total[token] += given.weights[token, slot] * hidden[0]
    return total


THROUGH: dict[str, Callable[..., Tensor]] = {"fp8_e4m3": through_fp8, "int8": through_int8}


@pytest.mark.parametrize("stored_as", ["fp8_e4m3", "int8"])
def test_activations_are_quantised_before_each_projection(stored_as: Any) -> None:
    through = THROUGH[stored_as]
    plain = QuantSpec(stored_as, "channel", group=5)
    outputs = [experts(inputs(plain))]
    for activations, group in (("token", 0), ("group", 5)):
        given = inputs(replace(plain, activations=activations))
        outputs.append(experts(given))
        near(outputs[-1], by_loops(given, lambda rows, name, expert, group=group: through(rows, group=group)))
    given = inputs(replace(plain, activations="static"))
    scales = given.tensors
    outputs.append(experts(given))
    near(
        outputs[-1],
        by_loops(given, lambda rows, name, e: through(rows, scale=scales[f"experts.{name}.input_scale"][e])),
    )
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-3 * one.abs().max()


def test_int8_activations_have_a_scale_a_token_and_group() -> None:
    x = torch.tensor([[1.0, -127, 3, 40, 0, 0], [0, 254, 3, 0, 0, 127]])
    assert through_int8(x).tolist() == [[1.0, -127, 3, 40, 0, 0], [0, 254, 4, 0, 0, 128]]
    assert through_int8(x, group=4)[1].tolist() == [0, 254, 4, 0, 0, 127]
    assert through_int8(x, scale=torch.tensor(0.25)).tolist() == [
        [1, -31.75, 3, 31.75, 0, 0],
        [0, 31.75, 3, 0, 0, 31.75],
    ]


@pytest.mark.parametrize("stored_as", ["int4", "mxfp4", "nvfp4"])
def test_activations_of_other_formats_are_unsupported_by_name(stored_as: Any) -> None:
    given = inputs(QuantSpec(stored_as, "group", group=16, activations="token"))
    with pytest.raises(Unsupported, match=f"got activations 'token' into {stored_as} weights, want them into fp8_e4m3"):
        experts(given)


def test_codes_of_another_dtype_and_missing_scales_are_refused() -> None:
    given = inputs(QUANTS["mxfp4"])
    codes = given.tensors["experts.w2"].to(torch.int8)
    with pytest.raises(InputError, match=r"experts.w2: got torch.int8, want torch.uint8 for mxfp4"):
        experts(replace(given, tensors={**given.tensors, "experts.w2": codes}))
    without = {name: tensor for name, tensor in given.tensors.items() if name != "experts.w2.scale"}
    with pytest.raises(InputError, match=r"experts.w2.scale is missing, want \[3, 22, 2\]"):
        experts(replace(given, tensors=without))


def test_a_rank_has_the_stored_tensors_of_its_own_experts() -> None:
    given = inputs(QuantSpec("int8", "channel", activations="static"))
    parts = []
    for held in ([2, 0], [1]):
        owners = torch.full((EXPERTS,), -1, dtype=torch.int32)
        owners[held] = torch.arange(len(held), dtype=torch.int32)
        own = {name: tensor[held] for name, tensor in given.tensors.items()}
        parts.append(experts(replace(given, tensors=own, expert_map=owners)))
    near(parts[0] + parts[1], experts(given))
