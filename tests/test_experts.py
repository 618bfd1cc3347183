"""Experts against numbers worked out by hand, their own algebra, and the modules of real models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_conformance.engine import ExpertsInputs
from moe_conformance.errors import InputError
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import activate, experts, mlp, rms_norm, routed_experts

Scalar = Callable[[float, float], float]
E, D, F = 5, 6, 4
SPEC = MLPSpec(F)
BIASED = MLPSpec(F, bias=True)
NAN = float("nan")


def made(spec: MLPSpec, *lead: int, prefix: str = "experts", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = spec.tensors(prefix, D, lead)
    return {name: normal(shape, f"{name} {shape}", dtype, std=0.5) for name, shape in shapes.items()}


def of(tensors: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """One expert's tensors."""
    return {name: tensor if "norm" in name else tensor[expert] for name, tensor in tensors.items()}


def x_of(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((tokens, D), "x", dtype)


def routing(tokens: int, experts: int = E, top_k: int = 3) -> tuple[Tensor, Tensor]:
    ids = normal((tokens, experts), "ids").argsort(dim=-1)[:, :top_k]
    return ids, normal((tokens, top_k), "weights", torch.float64) + 0.25


# ---- the activation of one pair of numbers


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def clip(v: float, low: float, high: float) -> float:
    return max(low, min(v, high))


def tanh_gelu(v: float) -> float:
    return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


GATED: list[tuple[MLPSpec, Scalar]] = [
    (MLPSpec(1), lambda g, u: g * sigmoid(g) * u),
    (MLPSpec(1, "gelu"), lambda g, u: g * (1 + math.erf(g / math.sqrt(2))) / 2 * u),
    (MLPSpec(1, "gelu_tanh"), lambda g, u: tanh_gelu(g) * u),
    (MLPSpec(1, "relu"), lambda g, u: max(g, 0) * u),
    (MLPSpec(1, "relu2"), lambda g, u: max(g, 0) ** 2 * u),
    (MLPSpec(1, alpha=1.75, up_offset=1.0), lambda g, u: g * sigmoid(1.75 * g) * (u + 1)),
    (
        MLPSpec(1, clamp="before", limit=1.25),
        lambda g, u: min(g, 1.25) * sigmoid(min(g, 1.25)) * clip(u, -1.25, 1.25),
    ),
    (
        MLPSpec(1, clamp="before", limit=1.25, alpha=1.75, up_offset=1.0),
        lambda g, u: min(g, 1.25) * sigmoid(1.75 * min(g, 1.25)) * (clip(u, -1.25, 1.25) + 1),
    ),
    (MLPSpec(1, clamp="after", limit=0.75), lambda g, u: min(g * sigmoid(g), 0.75) * clip(u, -0.75, 0.75)),
    (
        MLPSpec(1, clamp="before", limit=0.75, up_limit=1.5),
        lambda g, u: min(g, 0.75) * sigmoid(min(g, 0.75)) * clip(u, -1.5, 1.5),
    ),
    (
        MLPSpec(1, clamp="tanh", limit=1.25),
        lambda g, u: 1.25 * math.tanh(g / 1.25) * sigmoid(g) * 1.25 * math.tanh(u / 1.25),
    ),
    (
        MLPSpec(1, clamp="tanh", limit=1.25, up_limit=3.0),
        lambda g, u: 1.25 * math.tanh(g / 1.25) * sigmoid(g) * 3 * math.tanh(u / 3),
    ),
    (MLPSpec(1, limit=0.5), lambda g, u: g * sigmoid(g) * u),  # a limit without a clamp limits nothing
]


@pytest.mark.parametrize(("spec", "want"), GATED)
def test_a_gated_activation_is_the_formula_of_its_spec(spec: MLPSpec, want: Scalar) -> None:
    pairs = [(g, u) for g in (-3.0, -0.5, 0.25, 2.0) for u in (-2.5, -0.25, 0.5, 3.5)]
    got = activate(torch.tensor(pairs, dtype=torch.float64), spec)
    torch.testing.assert_close(got, torch.tensor([[want(g, u)] for g, u in pairs], dtype=torch.float64))


def test_gate_stands_before_up_and_not_between() -> None:
    got = activate(torch.tensor([[1.0, 2.0, 10.0, 100.0]]), MLPSpec(2, "relu"))
    assert got.tolist() == [[10.0, 200.0]]


def test_without_a_gate_the_activation_is_of_the_one_projection() -> None:
    got = activate(torch.tensor([[-2.0, 3.0]]), MLPSpec(2, "relu2", gated=False))
    assert got.tolist() == [[0.0, 9.0]]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
def test_a_float32_activation_is_rounded_once(activation: Any, gated: bool) -> None:
    projected = normal((64, 2 * F), "projected", torch.bfloat16)
    spec = MLPSpec(F, activation, gated, dtype="float32")
    got = activate(projected, spec)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, activate(projected.double(), spec).bfloat16())
    assert not gated or not torch.equal(got, activate(projected, MLPSpec(F, activation)))


def test_an_activation_in_the_input_dtype_rounds_after_each_step() -> None:
    gate, up = normal((64, 2 * F), "projected", torch.bfloat16).chunk(2, dim=-1)
    assert torch.equal(activate(torch.cat([gate, up], dim=-1), SPEC), torch.nn.functional.silu(gate) * up)


def test_float64_stays_float64_in_a_float32_activation() -> None:
    projected = normal((7, 2 * F), "projected", torch.float64) / 3
    assert torch.equal(activate(projected, MLPSpec(F, dtype="float32")), activate(projected, SPEC))


# ---- one MLP


def test_an_mlp_by_hand() -> None:
    tensors = {"a.w13": torch.tensor([[1.0, 2.0], [3.0, -4.0]]), "a.w2": torch.tensor([[10.0], [-1.0]])}
    # gate = 1 + 4 = 5, up = 3 - 8 = -5, relu(5) * -5 = -25
    assert mlp(torch.tensor([[1.0, 2.0]]), MLPSpec(1, "relu"), tensors, "a").tolist() == [[-250.0, 25.0]]


def test_an_mlp_without_gate_and_with_biases_by_hand() -> None:
    tensors = {
        "a.w1": torch.tensor([[1.0, 2.0]]),
        "a.b1": torch.tensor([-2.0]),
        "a.w2": torch.tensor([[10.0], [-1.0]]),
        "a.b2": torch.tensor([0.5, 0.25]),
    }
    # 1 + 4 - 2 = 3, squared 9
    spec = MLPSpec(1, "relu2", gated=False, bias=True)
    assert mlp(torch.tensor([[1.0, 2.0]]), spec, tensors, "a").tolist() == [[90.5, -8.75]]


@pytest.mark.parametrize("gated", [True, False])
def test_biases_are_added_to_both_projections(gated: bool) -> None:
    spec, first = MLPSpec(F, "gelu", gated, bias=True), "13" if gated else "1"
    t, x = made(spec, prefix="a"), x_of(7)
    hidden = activate(x @ t[f"a.w{first}"].T + t[f"a.b{first}"], spec)
    torch.testing.assert_close(mlp(x, spec, t, "a"), hidden @ t["a.w2"].T + t["a.b2"])


def test_the_weight_multiplies_what_the_spec_says() -> None:
    x, weight = x_of(7), normal((7, 1), "weight", torch.float64)
    for where in ("output", "input", "w2_input"):
        spec = MLPSpec(F, bias=True, weight_on=where)
        t = made(spec, prefix="a")
        scaled = {place: weight if place == where else 1.0 for place in ("output", "input", "w2_input")}
        hidden = activate((x * scaled["input"]) @ t["a.w13"].T + t["a.b13"], spec) * scaled["w2_input"]
        want = (hidden @ t["a.w2"].T + t["a.b2"]) * scaled["output"]
        torch.testing.assert_close(mlp(x, spec, t, "a", weight), want)
        unweighted = mlp(x, spec, t, "a")
        assert torch.equal(unweighted, mlp(x, spec, t, "a", torch.ones_like(weight)))


def test_several_weights_go_to_the_slices_of_one_mlp() -> None:
    spec = MLPSpec(3 * F, weight_on="w2_input")
    t, x, weights = made(spec, prefix="a"), x_of(7), normal((7, 3), "weights", torch.float64)
    want = torch.zeros_like(x)
    for number, weight in enumerate(weights.T):
        rows = slice(number * F, (number + 1) * F)
        gate, up = (block[rows] for block in t["a.w13"].chunk(2))
        own = {"a.w13": torch.cat([gate, up]), "a.w2": t["a.w2"][:, rows]}
        want += weight[:, None] * mlp(x, SPEC, own, "a")
    torch.testing.assert_close(mlp(x, spec, t, "a", weights), want)


def test_low_precision_weights_do_not_change_the_dtype_of_a_projection() -> None:
    for where in ("input", "w2_input"):
        spec = MLPSpec(F, weight_on=where)
        weight = normal((7, 1), "weight")  # float32, as routers give it
        got = mlp(x_of(7, torch.bfloat16), spec, made(spec, prefix="a", dtype=torch.bfloat16), "a", weight)
        assert got.dtype == torch.bfloat16


def test_the_output_norm_comes_before_the_weight() -> None:
    spec = MLPSpec(F, output_norm=0.25)
    t, x, weight = made(spec, prefix="a"), x_of(7), normal((7, 1), "weight", torch.float64)
    y = mlp(x, SPEC, t, "a") * (1 + t["a.output_norm"])
    want = weight * y / (y.square().mean(dim=-1, keepdim=True) + 0.25).sqrt()
    torch.testing.assert_close(mlp(x, spec, t, "a", weight), want)


def test_an_rms_norm_by_hand() -> None:
    got = rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.75)
    torch.testing.assert_close(got, torch.tensor([[1.0, 8 / 3, 0.0, 0.0]]))  # 25 / 4 + 2.75 = 9


def test_an_rms_norm_of_low_precision_is_rounded_once() -> None:
    x, scale = normal((64, D), "x", torch.bfloat16), normal((D,), "scale", torch.bfloat16)
    got = rms_norm(x, scale, 0.25)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rms_norm(x.double(), scale.double(), 0.25).bfloat16())
    assert rms_norm(x.double(), scale, 0.25).dtype == torch.float64


# ---- routed experts


def one_by_one(x: Tensor, spec: MLPSpec, t: dict[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """Every pair on its own."""
    rows = [
        sum((mlp(row[None], spec, of(t, e), "experts", w[None, None])[0] for e, w in zip(i, ws, strict=True)), 0 * row)
        for row, i, ws in zip(x, ids.tolist(), weights, strict=True)
    ]
    return torch.stack(rows) if rows else x.clone()


ROUTED = [
    SPEC,
    BIASED,
    MLPSpec(F, "relu2", gated=False),
    MLPSpec(F, "gelu", gated=False, bias=True),
    MLPSpec(F, "gelu_tanh", clamp="after", limit=0.5, bias=True),
    MLPSpec(F, clamp="before", limit=0.5, up_limit=0.75, alpha=1.75, up_offset=1.0, bias=True),
    MLPSpec(F, clamp="tanh", limit=0.5),
    MLPSpec(F, bias=True, weight_on="input"),
    MLPSpec(F, bias=True, weight_on="w2_input"),
    MLPSpec(F, bias=True, output_norm=0.25),
]


@pytest.mark.parametrize("spec", ROUTED, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_the_routed_sum_is_that_of_its_pairs(spec: MLPSpec, tokens: int) -> None:
    x, t, (ids, weights) = x_of(tokens), made(spec, E), routing(tokens)
    got = routed_experts(x, spec, t, ids, weights)
    torch.testing.assert_close(got, one_by_one(x, spec, t, ids, weights))
    assert got.shape == (tokens, D)


@pytest.mark.parametrize("ids", [[[2, 2]] * 4, [[0, 4]] * 4, [[4, 1], [1, 4], [4, 2], [2, 1]]], ids=str)
def test_any_load_of_the_experts_will_do(ids: list[list[int]]) -> None:
    x, t, chosen = x_of(4), made(BIASED, E), torch.tensor(ids, dtype=torch.int32)
    weights = routing(4, top_k=2)[1]
    torch.testing.assert_close(routed_experts(x, BIASED, t, chosen, weights), one_by_one(x, BIASED, t, chosen, weights))


def test_strides_do_not_matter() -> None:
    x, t, (ids, weights) = x_of(7), made(SPEC, E), routing(7)
    strided = [tensor.T.contiguous().T for tensor in (x, ids, weights)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(routed_experts(strided[0], SPEC, t, *strided[1:]), routed_experts(x, SPEC, t, ids, weights))


def test_the_order_of_a_row_s_pairs_does_not_change_a_bit() -> None:
    x, t, (ids, weights) = x_of(7, torch.float32), made(BIASED, E, dtype=torch.float32), routing(7)
    want = routed_experts(x, BIASED, t, ids, weights)
    assert torch.equal(routed_experts(x, BIASED, t, ids.flip(1), weights.flip(1)), want)


def test_the_routed_sum_is_linear_in_the_weights() -> None:
    x, t, (ids, weights) = x_of(7), made(BIASED, E), routing(7)
    other = normal(weights.shape, "other", torch.float64)
    parts = [routed_experts(x, BIASED, t, ids, w) for w in (weights, other, 2.5 * weights - other)]
    torch.testing.assert_close(parts[2], 2.5 * parts[0] - parts[1])


def test_a_dropped_pair_adds_nothing_whatever_its_weight() -> None:
    x, t, (ids, weights) = x_of(7), made(BIASED, E), routing(7)
    dropped = integers(ids.shape, "dropped", 2).bool()
    dropped[3] = True
    got = routed_experts(x, BIASED, t, ids.masked_fill(dropped, -1), weights.masked_fill(dropped, NAN))
    torch.testing.assert_close(got, routed_experts(x, BIASED, t, ids, weights.masked_fill(dropped, 0.0)))
    assert got[3].tolist() == [0.0] * D


def test_identity_experts_pass_their_input_on() -> None:
    x, t, (ids, weights) = x_of(7), made(SPEC, E), routing(7, E + 3, top_k=4)
    passed = weights.where(ids >= E, torch.zeros(())).sum(dim=1, keepdim=True) * x
    computed = routed_experts(x, SPEC, t, ids.where(ids < E, -1), weights)
    torch.testing.assert_close(routed_experts(x, SPEC, t, ids, weights, identity_experts=3), passed + computed)


@pytest.mark.parametrize(("ids", "identity", "message"), [
    ([[3, 0, -2]], 0, "ids: got -2 to 3, want 0 to 4, or -1 for a pair without an expert"),
    ([[5, 3, 4]], 0, "ids: got 3 to 5, want 0 to 4, or -1 for a pair without an expert"),
    ([[8, -1, 1]], 3, "ids: got -1 to 8, want 0 to 7, or -1 for a pair without an expert"),
])  # fmt: skip
def test_an_id_out_of_range_is_an_error(ids: list[list[int]], identity: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        routed_experts(x_of(1), SPEC, made(SPEC, E), torch.tensor(ids), torch.ones(1, 3), identity_experts=identity)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_sums_are_kept_in_float32_and_rounded_once(weights: torch.dtype) -> None:
    # 256 + 1 is 256 in bfloat16, whose sum would stay there.
    given = torch.tensor([[256.0, 1, 1, 1, 1]]).to(weights)
    x, ids = torch.ones(1, D, dtype=torch.bfloat16), torch.arange(E, E + 5)[None]
    got = routed_experts(x, SPEC, made(SPEC, E, dtype=torch.bfloat16), ids, given, identity_experts=5)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [[260.0] * D]


def test_sums_of_float64_are_kept_in_float64() -> None:
    x, ids = torch.ones(1, D, dtype=torch.float64), torch.tensor([[E, E + 1]])
    weights = torch.tensor([[2.0**30, 2.0**-10]])
    got = routed_experts(x, SPEC, made(SPEC, E), ids, weights, identity_experts=2)
    assert got.tolist() == [[2.0**30 + 2.0**-10] * D]


def test_fake_tensors_get_the_shape_and_dtype_without_a_look_at_ids() -> None:
    x, t, (ids, weights) = x_of(7, torch.bfloat16), made(BIASED, E, dtype=torch.bfloat16), routing(7)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in t.items()}
        got = routed_experts(mode.from_tensor(x), BIASED, fake, mode.from_tensor(ids), mode.from_tensor(weights))
    assert (got.shape, got.dtype, got.device) == (x.shape, x.dtype, x.device)


# ---- the stage of an engine


def stage(spec: MLPSpec, tokens: int = 7, **options: Any) -> ExpertsInputs:
    ids, weights = routing(tokens)
    return ExpertsInputs(x_of(tokens), spec, made(spec, E), ids, weights, **options)


def test_the_stage_hands_on_all_that_it_is_given() -> None:
    inputs = stage(BIASED)
    torch.testing.assert_close(experts(inputs), routed_experts(inputs.x, BIASED, inputs.tensors, *routing(7)))
    torch.testing.assert_close(experts(replace(inputs, output_scale=2.5)), 2.5 * experts(inputs))
    ids, weights = routing(7, E + 3, top_k=4)
    got = experts(replace(inputs, ids=ids, weights=weights, identity_experts=3))
    want = routed_experts(inputs.x, BIASED, inputs.tensors, ids, weights, identity_experts=3)
    assert torch.equal(got, want)


def test_a_scaled_sum_is_rounded_once() -> None:
    """257 times 0.5 in bfloat16: 257 is between two numbers, 256 and 258; its half is 128.5, between 128 and 129."""
    x = torch.ones(1, D, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[E, E + 1]]), torch.tensor([[256.0, 3.0]])
    inputs = ExpertsInputs(x, SPEC, made(SPEC, E, dtype=torch.bfloat16), ids, weights, identity_experts=2)
    assert experts(replace(inputs, output_scale=0.375)).tolist() == [[97.0] * D]  # 259 * 3 / 8 = 97.125; 260: 97.5


OWNERS = torch.tensor([1, -1, 0, -1, 2]), torch.tensor([-1, 1, -1, 0, -1])  # local ids, in no order


def held(tensors: Mapping[str, Tensor], owners: Tensor) -> dict[str, Tensor]:
    """A rank's experts by local id; the output norm is everybody's."""
    order = [int((owners == local).nonzero()) for local in range(int((owners >= 0).sum()))]
    return {name: t if "norm" in name else t[order] for name, t in tensors.items()}


@pytest.mark.parametrize("spec", [BIASED, MLPSpec(F, "relu2", gated=False, output_norm=0.25)], ids=["bias", "norm"])
def test_ranks_add_their_own_experts_pairs_and_nothing_of_the_others(spec: MLPSpec) -> None:
    whole = stage(spec)
    ids = whole.ids.index_fill(0, torch.tensor([2]), -1)
    want = experts(replace(whole, ids=ids))
    parts = []
    for owners in OWNERS:
        other = (ids < 0) | (owners[ids] < 0)  # [T, K]
        inputs = replace(
            whole,
            tensors=held(whole.tensors, owners),
            ids=ids,
            weights=whole.weights.masked_fill(other, NAN),
            x=whole.x.masked_fill(other.all(1, keepdim=True), NAN),
            expert_map=owners.int(),
        )
        assert inputs.experts == E
        parts.append(experts(inputs))
        assert (parts[-1][other.all(1)] == 0).all()
    torch.testing.assert_close(parts[0] + parts[1], want)


def test_identity_experts_stand_behind_those_of_all_ranks() -> None:
    ids, weights = torch.tensor([[0, E], [E + 1, -1], [1, E + 1]]), torch.tensor([[1.0, 2.0], [3.0, NAN], [NAN, 5.0]])
    inputs = ExpertsInputs(x_of(3), SPEC, held(made(SPEC, E), OWNERS[0]), ids, weights, OWNERS[0], identity_experts=2)
    own = mlp(x_of(3)[:1], SPEC, {n: t[0] for n, t in made(SPEC, E).items()}, "experts")
    want = torch.cat([own + 2 * x_of(3)[:1], 3 * x_of(3)[1:2], 5 * x_of(3)[2:]])
    torch.testing.assert_close(experts(inputs), want)
    for bad, got in ((E + 2, "-1 to 7"), (-2, "-2 to 6")):
        with pytest.raises(InputError, match=f"ids: got {got}, want 0 to 6"):
            experts(replace(inputs, ids=ids.masked_fill(ids == E, bad)))


def test_tensors_must_be_exactly_those_of_the_experts() -> None:
    inputs = stage(BIASED)
    tensors = dict(inputs.tensors)
    tensors["experts.w3"] = tensors.pop("experts.b2")
    tensors["experts.w13"] = tensors["experts.w13"].transpose(1, 2)
    with pytest.raises(InputError) as caught:
        experts(replace(inputs, tensors=tensors))
    assert str(caught.value) == (
        f"tensors: experts.b2 is missing, want [{E}, {D}]; experts.w3 is unknown; "
        f"experts.w13: got [{E}, {D}, {2 * F}], want [{E}, {2 * F}, {D}]; give exactly those of the spec"
    )


# ---- the modules of real models


def transposed(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "gate_up_proj": w["w13"].transpose(1, 2),
        "down_proj": w["w2"].transpose(1, 2),
        "gate_up_proj_bias": w["b13"],
        "down_proj_bias": w["b2"],
    }


def interleaved(w: dict[str, Tensor]) -> dict[str, Tensor]:
    mixed = {name: torch.stack(w[name].chunk(2, dim=1), dim=2).flatten(1, 2) for name in ("w13", "b13")}
    return transposed(w | mixed)


def plain(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"gate_up_proj": w["w13"], "down_proj": w["w2"]}


SWIGLU_OAI = MLPSpec(F, clamp="before", limit=1.25, alpha=1.75, up_offset=1.0)
OAI_CONFIG = {"intermediate_size": F, "swiglu_alpha": 1.75, "swiglu_limit": 1.25}
CLAMPED, CLAMP_CONFIG = MLPSpec(F, clamp="before", limit=1.25), {"moe_intermediate_size": F, "swiglu_limit": 1.25}
REAL: list[tuple[str, str, dict[str, Any], MLPSpec, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = [
    ("gpt_oss", "GptOssExperts", OAI_CONFIG, MLPSpec(**vars(SWIGLU_OAI) | {"bias": True}), interleaved),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        OAI_CONFIG,
        MLPSpec(**vars(SWIGLU_OAI) | {"bias": True}),
        transposed,
    ),
    ("minimax_m3_vl", "MiniMaxM3VLExperts", OAI_CONFIG, SWIGLU_OAI, plain),
    ("deepseek_v4", "DeepseekV4Experts", {"intermediate_size": F, "swiglu_limit": 1.25}, CLAMPED, plain),
    ("glm5_next", "Glm5NextTextExperts", CLAMP_CONFIG, CLAMPED, plain),
    ("hy_v4", "HYV4Experts", CLAMP_CONFIG, CLAMPED, plain),
    ("step3p7", "Step3p7Experts", CLAMP_CONFIG, MLPSpec(F, clamp="after", limit=0.75), plain),
    (
        "inkling2",
        "Inkling2Experts",
        {"moe_intermediate_size": F, "mlp_gate_softcap": 1.25, "mlp_up_softcap": 3.0},
        MLPSpec(F, clamp="tanh", limit=1.25, up_limit=3.0, dtype="float32"),
        plain,
    ),
    ("beam", "BeamExperts", {"moe_intermediate_size": F}, MLPSpec(F, dtype="float32"), plain),
    (
        "muse_spark",
        "MuseSparkExperts",
        {"moe_intermediate_size": F, "moe_hidden_size": D, "post_norm_eps": 0.25},
        MLPSpec(F, output_norm=0.25),
        lambda w: {**plain(w), "post_expert_norm.weight": w["output_norm"]},
    ),
    (
        "nemotron_h",
        "NemotronHExperts",
        {"moe_intermediate_size": F, "moe_latent_size": None, "mlp_hidden_act": "relu2"},
        MLPSpec(F, "relu2", gated=False),
        lambda w: {"up_proj": w["w1"], "down_proj": w["w2"]},
    ),
    (
        "gemma4",
        "Gemma4TextExperts",
        {"moe_intermediate_size": F, "hidden_activation": "gelu_pytorch_tanh"},
        MLPSpec(F, "gelu_tanh"),
        plain,
    ),
]


@pytest.mark.parametrize(("family", "name", "config", "spec", "layout"), REAL, ids=[row[0] for row in REAL])
def test_experts_of_a_real_model_agree(
    family: str,
    name: str,
    config: dict[str, Any],
    spec: MLPSpec,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    counts = {"num_experts": E, "num_local_experts": E, "n_routed_experts": E}
    shared = {"hidden_size": D, "hidden_act": "silu", "_experts_implementation": "eager"}
    extra = {"swiglu_limit": 0.75} if family == "step3p7" else {}
    experts = getattr(module, name)(SimpleNamespace(**counts, **shared, **config), **extra)
    t = made(spec, E, dtype=torch.float32)
    experts.load_state_dict(layout({name.removeprefix("experts."): tensor for name, tensor in t.items()}))
    x, (ids, weights) = 2 * x_of(31, torch.float32), routing(31)
    with torch.no_grad():
        want = experts(x, ids, weights.float())
    error = (routed_experts(x, spec, t, ids, weights.float()) - want).abs().max()
    assert error <= 1e-6 * want.abs().max()


def test_identity_experts_of_a_real_model_agree() -> None:
    module = importlib.import_module("transformers.models.longcat_flash.modeling_longcat_flash")
    sizes = {"hidden_size": D, "expert_ffn_hidden_size": F, "n_routed_experts": E, "zero_expert_num": 3}
    experts = module.LongcatFlashExperts(SimpleNamespace(**sizes, hidden_act="silu"))
    t, unused = made(SPEC, E, dtype=torch.float32), torch.zeros(3, 2 * F, D)  # the module has rows for all eight
    rows = {"gate_up_proj": torch.cat([t["experts.w13"], unused]), "down_proj": t["experts.w2"]}
    experts.load_state_dict(rows)
    x, (ids, weights) = x_of(31, torch.float32), routing(31, E + 3, top_k=4)
    with torch.no_grad():
        want = experts(x, ids, weights.float())
    error = (routed_experts(x, SPEC, t, ids, weights.float(), identity_experts=3) - want).abs().max()
    assert error <= 1e-6 * want.abs().max()


def test_weighted_shared_experts_of_a_real_model_agree() -> None:
    module = importlib.import_module("transformers.models.inkling.modeling_inkling")
    config = SimpleNamespace(n_shared_experts=3, moe_intermediate_size=F, hidden_size=D, hidden_act="silu")
    experts, spec = module.InklingSharedExperts(config), MLPSpec(3 * F, weight_on="w2_input")
    t, x = made(spec, prefix="shared", dtype=torch.float32), x_of(31, torch.float32)
    gate, up = (half.unflatten(0, (3, F)) for half in t["shared.w13"].chunk(2))
    down = t["shared.w2"].unflatten(1, (3, F)).transpose(0, 1)
    experts.load_state_dict({"gate_proj": gate, "up_proj": up, "down_proj": down})
    weights = normal((31, 3), "weights")
    with torch.no_grad():
        want = experts(x, weights)
    error = (mlp(x, spec, t, "shared", weights) - want).abs().max()
    assert error <= 1e-6 * want.abs().max()
