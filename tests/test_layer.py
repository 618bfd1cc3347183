"""The layer against its own algebra: each part on and off, and what a block refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import BlockInputs, ExpertsInputs, LayerInputs, MoESpec, QuantSpec, Routing
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.model.specs import (
    Capacity,
    DenseSpec,
    LatentSpec,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RoutingSpec,
    SharedSpec,
)
from moe_conformance.oracle.layer import layer_bound
from moe_conformance.oracle.storage import Storage
from moe_conformance.reference_impl import block as block_stage
from moe_conformance.reference_impl.block import block, layer_spec
from moe_conformance.reference_impl.experts import experts, mlp, rms_norm, routed_experts
from moe_conformance.reference_impl.layer import layer, moe_layer
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import route_logits

T, H, E, K, F, D, FS = 7, 6, 5, 3, 4, 8, 9
EXPERTS, SHARED = MLPSpec(F, "gelu_tanh", bias=True), MLPSpec(FS, "relu2", bias=True)
SPEC = LayerSpec(H, E, LogitsSpec(), RoutingSpec(K, renormalize="sum", scale=2.5), EXPERTS)
Tensors = dict[str, Tensor]


def made(spec: LayerSpec, dtype: torch.dtype = torch.float64) -> Tensors:
    """Every tensor of the layer; the same name has the same values in every spec that has it."""
    tensors = {name: normal(shape, f"{name} {shape}", dtype, std=0.5) for name, shape in spec.tensors().items()}
    if "router.table" in tensors:
        tensors["router.table"] = integers(tensors["router.table"].shape, "table", spec.num_experts)
    return tensors


def x_of(tokens: int = T, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((tokens, H), "x", dtype)


def output(spec: LayerSpec, **options: Any) -> Tensor:
    return layer(x_of(), spec, made(spec), **options).output


def routed(spec: LayerSpec, x: Tensor) -> Tensor:
    """The routed sum of these inputs of the experts, by the router's choice for the layer's own input."""
    t, result = made(spec), layer(x_of(), spec, made(spec))
    return routed_experts(x, spec.experts, t, result.ids, result.weights)


# ---- the router's part


def test_the_router_s_choice_reaches_the_experts() -> None:
    t, result = made(SPEC), layer(x_of(), SPEC, made(SPEC))
    ids, weights, _ = route_logits(router_logits(x_of(), SPEC.logits, t)[0], SPEC.routing, t)
    assert torch.equal(result.ids, ids)
    assert torch.equal(result.weights, weights)
    torch.testing.assert_close(result.output, routed_experts(x_of(), EXPERTS, t, ids, weights))
    assert result.state is None


def test_a_given_routing_replaces_the_router_s() -> None:
    ids, weights = torch.tensor([[0, -1, 4]] * T), normal((T, K), "weights", torch.float64)
    result = layer(x_of(), SPEC, made(SPEC), routing=Routing(ids, weights))
    assert result.ids is ids
    assert result.weights is weights
    torch.testing.assert_close(result.output, routed_experts(x_of(), EXPERTS, made(SPEC), ids, weights))


def test_token_ids_reach_a_table() -> None:
    spec = replace(SPEC, routing=RoutingSpec(K, selector="table"), vocab_size=11)
    token_ids = integers((T,), "tokens", 11)
    ids = layer(x_of(), spec, made(spec), token_ids=token_ids).ids
    assert torch.equal(ids, made(spec)["router.table"][token_ids])


def test_a_router_state_is_taken_and_passed_on() -> None:
    logits = LogitsSpec("zaya", width=3, takes_state=True)
    spec = replace(SPEC, logits=logits)
    state = normal((T, 3), "state", torch.float64)
    want = router_logits(x_of(), logits, made(spec), state=state)[1]
    got = layer(x_of(), spec, made(spec), state=state).state
    assert want is not None
    assert got is not None
    assert torch.equal(got, want)


def test_sequences_share_the_tokens_evenly() -> None:
    spec = replace(SPEC, routing=RoutingSpec(1, capacity=Capacity(tokens=1)))
    x = x_of(1).expand(6, H)  # everybody wants one expert, which takes one token of each sequence
    for sequences in (1, 2, 3):
        kept = layer(x, spec, made(spec), sequences=sequences).weights.flatten() != 0
        assert kept.tolist() == [number % (6 // sequences) == 0 for number in range(6)]
    assert torch.equal(layer(x, spec, made(spec)).weights, layer(x, spec, made(spec), sequences=1).weights)


# ---- the experts' part


def test_the_output_scale_meets_the_routed_sum_only() -> None:
    spec = replace(SPEC, shared=SharedSpec(SHARED), output_bias=True)
    scaled = output(replace(spec, output_scale=2.5))
    torch.testing.assert_close(scaled - output(spec), 1.5 * routed(spec, x_of()))


def test_identity_experts_reach_the_routed_sum() -> None:
    spec = replace(SPEC, routing=RoutingSpec(K, identity_experts=3))
    ids, weights = torch.tensor([[E, E + 2, -1]] * T), normal((T, K), "weights", torch.float64)
    got = output(spec, routing=Routing(ids, weights))
    torch.testing.assert_close(got, weights[:, :2].sum(dim=1, keepdim=True) * x_of())


@pytest.mark.parametrize("norm_eps", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
def test_latent_experts_work_between_two_projections(norm_eps: float, bias: bool) -> None:
    spec = replace(SPEC, latent=LatentSpec(D, norm_eps, bias), output_scale=2.5, shared=SharedSpec(SHARED))
    t = made(spec)
    inner = x_of() @ t["latent.in"].T + (t["latent.in_bias"] if bias else 0)
    if norm_eps:
        inner = rms_norm(inner, 1 + t["latent.norm"], norm_eps)
    want = 2.5 * routed(spec, inner) @ t["latent.out"].T + (t["latent.out_bias"] if bias else 0)
    torch.testing.assert_close(output(spec), want + mlp(x_of(), SHARED, t, "shared"))


def test_shared_experts_are_added_once_and_unweighted() -> None:
    spec = replace(SPEC, shared=SharedSpec(SHARED))
    torch.testing.assert_close(output(spec), output(SPEC) + mlp(x_of(), SHARED, made(spec), "shared"))


def test_a_shared_gate_is_the_sigmoid_of_a_projection_of_the_input() -> None:
    spec = replace(SPEC, shared=SharedSpec(SHARED, gate=True))
    t = made(spec)
    gate = 1 / (1 + (-x_of() @ t["shared.gate"].T).exp())  # [T, 1]
    torch.testing.assert_close(output(spec), output(SPEC) + gate * mlp(x_of(), SHARED, t, "shared"))


def test_an_average_is_that_of_the_routed_and_the_shared_sum() -> None:
    average: Any = "".join(["aver", "age"])  # equal to the literal, not the same object: as read from a file
    spec = replace(SPEC, shared=SharedSpec(SHARED, count=3))
    assert torch.equal(output(replace(spec, shared=SharedSpec(SHARED, 3, combine=average))), output(spec) / 2)


def test_shared_experts_get_the_weights_the_router_gives_them() -> None:
    shared = SharedSpec(MLPSpec(FS, weight_on="w2_input"), count=3, weighted=True)
    spec = replace(SPEC, routing=RoutingSpec(K, score="sigmoid", renormalize="sum", shared_classes=3), shared=shared)
    t, x = made(spec), x_of()
    ids, weights, own = route_logits(router_logits(x, spec.logits, t)[0], spec.routing, t)
    want = routed_experts(x, EXPERTS, t, ids, weights) + mlp(x, shared.mlp, t, "shared", own)
    torch.testing.assert_close(output(spec), want)
    given = output(spec, routing=Routing(ids.flip(0), weights))  # a given routing leaves the shared weights as they are
    want += routed_experts(x, EXPERTS, t, ids.flip(0), weights) - routed_experts(x, EXPERTS, t, ids, weights)
    torch.testing.assert_close(given, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_float32_has_the_bits_of_a_sum_in_the_parts_dtype(dtype: torch.dtype) -> None:
    spec = replace(SPEC, shared=SharedSpec(SHARED))
    t, x = made(spec, dtype), x_of(dtype=dtype)
    parts = [layer(x, SPEC, t).output, mlp(x, SHARED, t, "shared")]
    assert torch.equal(layer(x, spec, t).output, (parts[0].float() + parts[1].float()).to(dtype))


def test_a_dense_mlp_is_added() -> None:
    spec = replace(SPEC, dense=DenseSpec(SHARED))
    torch.testing.assert_close(output(spec), output(SPEC) + mlp(x_of(), SHARED, made(spec), "dense"))


def test_four_norms_stand_around_experts_and_dense_mlp_but_not_before_the_router() -> None:
    eps = 0.25
    spec = replace(SPEC, dense=DenseSpec(SHARED, norm_eps=eps))
    t, x = made(spec), x_of()
    ids, weights, _ = route_logits(router_logits(x, spec.logits, t)[0], spec.routing, t)
    experts = routed_experts(rms_norm(x, t["experts.norm"], eps), EXPERTS, t, ids, weights)
    dense = mlp(rms_norm(x, t["dense.norm"], eps), SHARED, t, "dense")
    want = rms_norm(experts, t["experts.sum_norm"], eps) + rms_norm(dense, t["dense.sum_norm"], eps)
    torch.testing.assert_close(output(spec), want)


def test_an_output_bias_is_added_once() -> None:
    spec = replace(SPEC, output_bias=True)
    torch.testing.assert_close(output(spec), output(SPEC) + made(spec)["output.bias"])


def test_an_output_norm_is_of_the_whole_sum() -> None:
    spec = replace(SPEC, shared=SharedSpec(SHARED), dense=DenseSpec(SHARED), output_bias=True)
    normed = replace(spec, output_norm=0.25)
    torch.testing.assert_close(output(normed), rms_norm(output(spec), made(normed)["output.norm"], 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_part_together_keeps_the_dtype_and_takes_any_number_of_tokens(dtype: torch.dtype) -> None:
    spec = replace(
        SPEC,
        shared=SharedSpec(SHARED, gate=True, combine="average"),
        latent=LatentSpec(D, 0.25, bias=True),
        dense=DenseSpec(SHARED, norm_eps=0.25),
        output_scale=2.5,
        output_bias=True,
        output_norm=0.25,
    )
    t = made(spec, dtype)
    x = x_of(dtype=dtype)
    whole, ids, weights, _ = layer(x, spec, t)
    assert (whole.shape, whole.dtype) == ((T, H), dtype)
    wide = {name: tensor.double() for name, tensor in t.items()}
    exact = layer(x.double(), spec, wide, routing=Routing(ids, weights.double())).output
    assert ((whole.double() - exact).abs() <= layer_bound(x, spec, t, ids, weights, Storage.stored(dtype)).limit).all()
    for tokens in (0, 1):
        assert layer(x_of(tokens, dtype), spec, t).output.shape == (tokens, H)


# ---- the layer behind given logits, with an engine's padded widths

# Each has what a padded width could spoil; behind the first, every part that a layer may have.
LAYERS = {
    "gated": replace(SPEC, experts=replace(EXPERTS, bias=False)),
    "shared-latent": replace(
        SPEC, latent=LatentSpec(D, 0.25, bias=True), shared=SharedSpec(SHARED, gate=True), output_scale=2.5
    ),
    "not-gated": replace(SPEC, experts=MLPSpec(F, "relu2", gated=False, bias=True)),
    "gpt-oss": replace(SPEC, experts=MLPSpec(F, clamp="before", limit=0.5, alpha=1.7, up_offset=1.0, bias=True)),
    "output-norm": replace(SPEC, experts=MLPSpec(F, output_norm=0.25), latent=LatentSpec(D)),
    "weight-on-w2": replace(SPEC, experts=MLPSpec(F, clamp="tanh", limit=0.5, weight_on="w2_input", bias=True)),
    "identity": replace(SPEC, routing=RoutingSpec(K, identity_experts=3, scale=2.5)),
    "dense": replace(SPEC, dense=DenseSpec(SHARED, norm_eps=0.25), output_bias=True, output_norm=0.25),
}
layers = pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)


def inputs_of(spec: LayerSpec, **options: Any) -> LayerInputs:
    tensors = made(spec)
    logits, _ = router_logits(x_of(), spec.logits, tensors)
    return LayerInputs(x_of(), logits, spec, {n: t for n, t in tensors.items() if n != "router.proj"}, **options)


@layers
def test_the_layer_stage_is_the_layer_behind_its_logits(spec: LayerSpec) -> None:
    torch.testing.assert_close(moe_layer(inputs_of(spec)), output(spec))


@pytest.mark.parametrize(("hidden", "intermediate"), [(16, None), (None, 11), (16, 11)])
@layers
def test_padding_changes_nothing(spec: LayerSpec, hidden: int | None, intermediate: int | None) -> None:
    padded = inputs_of(spec, padded_hidden=hidden, padded_intermediate=intermediate)
    torch.testing.assert_close(moe_layer(padded), output(spec))


def test_padded_widths_reach_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(x: Tensor, spec: MLPSpec, tensors: Tensors, *rest: Any, **options: Any) -> Tensor:
        seen.append((x.shape[1], *(tuple(tensors[f"experts.{name}"].shape) for name in ("w13", "b13", "w2", "b2"))))
        return routed_experts(x, spec, tensors, *rest, **options)

    monkeypatch.setattr("moe_conformance.reference_impl.layer.routed_experts", watched)
    moe_layer(inputs_of(SPEC, padded_hidden=16))
    moe_layer(inputs_of(SPEC, padded_intermediate=11))
    assert seen == [
        (16, (E, 2 * F, 16), (E, 2 * F), (E, 16, F), (E, 16)),
        (H, (E, 22, H), (E, 22), (E, H, 11), (E, H)),
    ]


def test_what_the_router_needs_reaches_it() -> None:
    """A scale an expert, weights of shared experts, and token ids."""
    shared = SharedSpec(MLPSpec(FS, weight_on="w2_input"), count=3, weighted=True)
    weighted = RoutingSpec(K, score="sigmoid", shared_classes=3)
    for spec in (
        replace(SPEC, routing=replace(SPEC.routing, per_expert_scale=True)),
        replace(SPEC, routing=weighted, shared=shared),
    ):
        torch.testing.assert_close(moe_layer(inputs_of(spec)), output(spec))
    spec = replace(SPEC, routing=RoutingSpec(K, selector="table"), vocab_size=11)
    token_ids = integers((T,), "tokens", 11)
    torch.testing.assert_close(moe_layer(inputs_of(spec, token_ids=token_ids)), output(spec, token_ids=token_ids))


@pytest.mark.parametrize("padded", [{}, {"padded_hidden": 16, "padded_intermediate": 11}], ids=["", "padded"])
@pytest.mark.parametrize("activations", ["no", "token", "static"])
def test_stored_experts_reach_the_experts_as_they_lie(activations: Any, padded: dict[str, int]) -> None:
    quant = QuantSpec("int8", "channel", activations=activations)
    spec = replace(SPEC, latent=LatentSpec(D), shared=SharedSpec(SHARED))
    shapes = quant.tensors("experts", EXPERTS, D, (E,))
    stored = {name: normal(shape, name).abs() / 64 + 0.01 for name, shape in shapes.items()}
    stored |= {name: integers(shapes[name], name, 127, -127).to(torch.int8) for name in ("experts.w13", "experts.w2")}

    def by_stage(x: Tensor, mlp: MLPSpec, tensors: Any, ids: Tensor, weights: Tensor, **_: Any) -> Tensor:
        return experts(ExpertsInputs(x, mlp, stored, ids, weights, quant=quant))

    tensors, inputs = made(spec) | stored, inputs_of(spec, **padded)
    got = moe_layer(replace(inputs, tensors={**inputs.tensors, **stored}, quant=quant))
    torch.testing.assert_close(got, layer(x_of(), spec, tensors, experts=by_stage).output)


# ---- the block of a model


def model(*layers: LayerSpec, moe_layers: tuple[int, ...] = (1, 3), encoder: tuple[int, ...] = ()) -> MoESpec:
    return MoESpec(4, moe_layers, E, K, H, F, layers=layers, encoder_moe_layers=encoder)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `describe` says of any config."""
    return lambda spec: monkeypatch.setattr(block_stage, "describe", lambda config: spec)


def test_a_block_is_its_layer_on_flattened_tokens(described: Any) -> None:
    logits = LogitsSpec("zaya", width=3, takes_state=True)
    routing = RoutingSpec(1, selector="table", capacity=Capacity(tokens=1))
    spec = replace(SPEC, logits=logits, routing=routing, vocab_size=11)
    described(model(SPEC, spec))
    x, token_ids = normal((2, 3, H), "x", torch.float64), torch.full((2, 3), 8)
    state = normal((2, 3, 3), "state", torch.float64)
    got = block(BlockInputs({}, 3, made(spec), x, token_ids, state))
    want = layer(x.view(6, H), spec, made(spec), token_ids=token_ids.view(6), state=state.view(6, 3), sequences=2)
    assert torch.equal(got.output, want.output)
    assert got.routing is not None
    assert torch.equal(got.routing.ids, want.ids)
    assert torch.equal(got.routing.weights, want.weights)
    assert (want.weights != 0).flatten().tolist() == [True, False, False] * 2  # capacity is of a sequence


def test_a_block_with_a_given_routing_does_not_say_it_again(described: Any) -> None:
    described(model(SPEC, SPEC))
    ids, weights = torch.tensor([[0, -1, 4]] * 6), normal((6, K), "weights", torch.float64)
    x = normal((2, 3, H), "x", torch.float64)
    got = block(BlockInputs({}, 1, made(SPEC), x, routing=Routing(ids, weights)))
    assert got.routing is None
    assert torch.equal(got.output, routed_experts(x.view(6, H), EXPERTS, made(SPEC), ids, weights))


def test_a_layer_is_found_by_its_index_in_the_model(described: Any) -> None:
    other = replace(SPEC, output_scale=2.5)
    described(model(SPEC, other))
    assert [layer_spec({}, index) for index in (1, 3)] == [SPEC, other]
    described(model(SPEC, other, moe_layers=(), encoder=(0, 2)))
    assert [layer_spec({}, index) for index in (0, 2)] == [SPEC, other]
    described(model(SPEC, other, encoder=(0, 2)))
    assert [layer_spec({}, index) for index in (1, 3)] == [SPEC, other]


def test_a_layer_without_experts_is_an_error(described: Any) -> None:
    described(model(SPEC, SPEC))
    with pytest.raises(InputError, match="layer: got 2, want one that has experts, out of 1, 3"):
        layer_spec({}, 2)


def test_a_model_that_cannot_be_said_is_unsupported(described: Any) -> None:
    described(model())
    with pytest.raises(Unsupported, match="got model_type 'odd', want one whose record"):
        layer_spec({"model_type": "odd"}, 1)


def test_another_implementation_than_the_one_there_is_is_unsupported(described: Any) -> None:
    described(model(SPEC, SPEC))
    x = normal((2, 3, H), "x", torch.float64)
    with pytest.raises(Unsupported, match="got implementation 'grouped_mm', want None"):
        block(BlockInputs({}, 1, made(SPEC), x, implementation="grouped_mm"))


def test_tensors_must_be_exactly_those_of_the_layer(described: Any) -> None:
    described(model(SPEC, SPEC))
    tensors = made(SPEC)
    block(BlockInputs({}, 1, tensors, normal((2, 3, H), "x", torch.float64)))
    tensors["experts.w3"] = tensors.pop("experts.w2")
    tensors["router.proj"] = tensors["router.proj"].T
    tensors["experts.b2"] = tensors["experts.b2"][:, 1:]
    with pytest.raises(InputError) as caught:
        block(BlockInputs({}, 1, tensors, normal((2, 3, H), "x")))
    assert str(caught.value) == (
        f"tensors: experts.w2 is missing, want [{E}, {H}, {F}]; experts.w3 is unknown; "
        f"router.proj: got [{H}, {E}], want [{E}, {H}]; "
        f"experts.b2: got [{E}, {H - 1}], want [{E}, {H}]; give exactly those of the spec"
    )
