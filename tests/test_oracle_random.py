"""Oracle and reference, which share no helper that computes, against each other on random specs.

Derandomised: the same specs in every run. A disagreement is a fault in one of both, or a spec that says too little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_conformance.engine import (
    Capacity,
    DenseSpec,
    ExpertsInputs,
    LatentSpec,
    LayerInputs,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RouteInputs,
    Routing,
    RoutingSpec,
    SharedSpec,
)
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.choice import best, choose
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.oracle.layer import expected_layer, layer_value
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.oracle.scores import compared_value
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.weights import weights_value
from moe_conformance.reference_impl.experts import experts
from moe_conformance.reference_impl.layer import experts_output, moe_layer
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import route_logits

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
EVERY = settings(
    derandomize=True, deadline=None, max_examples=100, database=None, suppress_health_check=[HealthCheck.too_slow]
)
ROWS = 8
booleans, seeds = st.booleans(), st.integers(0, 2**30)


@st.composite
def plain_routings(draw: Any) -> tuple[RoutingSpec, int]:
    """A router that takes the best of its scores, and E."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4)))
    experts = groups * draw(st.integers(1 if groups > 1 else 4, 5))
    top_groups = draw(st.integers(1, groups))
    special = (
        draw(st.sampled_from(("none", "identity", "skip", "shared", "capacity", "scales"))) if groups == 1 else "none"
    )
    return RoutingSpec(
        draw(st.integers(1, min(4, experts))),
        logit_scale=draw(st.sampled_from((1.0, 0.75, 1.7))),
        logit_softcap=draw(st.sampled_from((0.0, 0.0, 2.5))),
        score="sigmoid" if special == "shared" else draw(st.sampled_from(("softmax", "sigmoid", "sqrt_softplus"))),
        score_dtype=draw(st.sampled_from(("float32", "input"))),
        select_on="scores" if special == "capacity" else draw(st.sampled_from(("scores", "scores", "logits"))),
        selection_bias=draw(booleans),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(("max", "top2_sum"))),
        group_mask=draw(st.sampled_from((-torch.inf, 0.0, 0.3))),
        renormalize=draw(st.sampled_from(("no", "sum", "norm"))),
        epsilon=draw(st.sampled_from((0.0, 1e-20, 0.05))),
        floor=draw(st.sampled_from((0.0, 1e-12, 0.6))),
        norm_order=draw(st.sampled_from((1.0, 2.0, 3.0))),
        scale=draw(st.sampled_from((1.0, 2.5))),
        per_expert_scale=special == "scales",
        global_scale=special == "scales" and draw(booleans),
        identity_experts=2 if special == "identity" else 0,
        skip_expert=special == "skip",
        shared_classes=2 if special == "shared" else 0,
        capacity=draw(capacities()) if special == "capacity" else None,
    ), experts


@st.composite
def capacities(draw: Any) -> Capacity:
    return Capacity(
        tokens=draw(st.sampled_from((None, 1, 2, 3))),
        fraction=draw(st.sampled_from((0.0, 0.3))),
        per=draw(st.sampled_from(("sequence", "batch"))),
        renormalize_before=draw(booleans),
        by_weight=draw(booleans),
    )


@st.composite
def odd_routings(draw: Any) -> tuple[RoutingSpec, int]:
    """A router that chooses in a way of its own, and E."""
    selector = draw(st.sampled_from(("sparsemixer", "table", "product_keys")))
    experts = draw(st.sampled_from((4, 9, 16)))
    return RoutingSpec(
        draw(st.integers(1, 3)),
        score="softmax"
        if selector == "sparsemixer"
        else draw(st.sampled_from(("softmax", "sigmoid", "sqrt_softplus"))),
        score_dtype=draw(st.sampled_from(("float32", "input"))),
        selector=selector,
        select_on="scores" if selector == "table" else "logits",
        jitter=draw(st.sampled_from((0.01, 0.1, 0.3))),
        renormalize="no" if selector == "sparsemixer" else draw(st.sampled_from(("no", "sum", "norm"))),
        scale=draw(st.sampled_from((1.0, 2.5))),
    ), experts


routings = st.one_of(plain_routings(), plain_routings(), plain_routings(), odd_routings())


def route_inputs(spec: RoutingSpec, experts: int, seed: int, dtype: torch.dtype) -> RouteInputs:
    random = torch.Generator().manual_seed(seed)
    classes = spec.classes(experts)
    routed = experts if spec.selector == "product_keys" else classes - spec.shared_classes
    tensors = {
        "router.selection_bias": torch.randn(routed, generator=random) / 4,
        "router.per_expert_scale": (torch.rand(experts, generator=random) + 0.5).to(BF16).to(dtype),
        "router.global_scale": torch.tensor([1.375]),
        "router.table": torch.stack([torch.randperm(experts, generator=random)[: spec.top_k] for _ in range(5)]),
    }
    logits = (torch.randn(ROWS, classes, generator=random) * 2).to(BF16).to(dtype)
    token_ids = torch.randint(5, (ROWS,), generator=random) if spec.selector == "table" else None
    return RouteInputs(logits, spec, tensors, token_ids=token_ids, sequences=2)


def routed(inputs: RouteInputs) -> Any:
    return route_logits(
        inputs.logits, inputs.routing, inputs.tensors, token_ids=inputs.token_ids, sequences=inputs.sequences
    )


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@EVERY
@given(routings, seeds)
def test_the_reference_s_router_is_accepted(dtype: torch.dtype, method: tuple[RoutingSpec, int], seed: int) -> None:
    inputs = route_inputs(*method, seed, dtype)
    answer = routed(inputs)
    judge_routing("route", Routing(answer.ids, answer.weights), inputs)


@EVERY
@given(routings, seeds)
def test_weights_in_float64_are_the_reference_s(method: tuple[RoutingSpec, int], seed: int) -> None:
    spec, inputs = method[0], route_inputs(*method, seed, FP64)
    answer = routed(inputs)
    ids, dropped = answer.ids, answer.weights == 0
    if spec.skip_expert:
        ids = ids.masked_fill(dropped, inputs.logits.shape[1] - 1)
    if not (spec.skip_expert or spec.capacity):
        dropped = torch.zeros_like(dropped)
    weights, shared = weights_value(inputs.logits, ids, spec, inputs.tensors, FP64, dropped)
    torch.testing.assert_close(weights.exact, answer.weights, rtol=1e-12, atol=0)
    assert (shared is None) == (answer.shared is None)
    if shared is not None:
        torch.testing.assert_close(shared.exact, answer.shared, rtol=1e-12, atol=0)


@EVERY
@given(routings, seeds)
def test_the_oracle_s_own_choice_is_the_reference_s(method: tuple[RoutingSpec, int], seed: int) -> None:
    inputs = route_inputs(*method, seed, FP32)
    try:
        mine = choose(inputs, None, FP32)
    except ValueError:
        assume(False)
    answer = routed(inputs)
    got = torch.zeros(ROWS, 99).scatter_add_(1, answer.ids.clamp(min=0), answer.weights)
    kept = mine.weights.exact.masked_fill(mine.ids < 0, 0.0)
    want = torch.zeros(ROWS, 99, dtype=FP64).scatter_add_(1, mine.ids.clamp(min=0), kept)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6)


@EVERY
@given(plain_routings(), seeds)
def test_another_expert_for_the_last_is_refused(method: tuple[RoutingSpec, int], seed: int) -> None:
    """The best one left out, where errors do not bridge the gap: of scores that random numbers make, all but always."""
    spec, experts = method
    spec = replace(spec, capacity=None, skip_expert=False, score_dtype="float32")
    inputs = route_inputs(spec, experts, seed, FP32)
    compared = compared_value(inputs.logits, spec, inputs.tensors, FP32)
    (ids, certain), count = best(compared, spec), compared.exact.shape[1]
    assume(bool(certain.all()) and spec.top_k < count)
    others = torch.ones(ROWS, count, dtype=torch.bool).scatter(1, ids, False)
    other = compared.exact.masked_fill(~others, -torch.inf).argmax(-1, keepdim=True)
    swapped = torch.cat([ids[:, :-1], other], dim=1)
    weights, _ = weights_value(inputs.logits, swapped, spec, inputs.tensors, FP32)
    with pytest.raises(Nonconformance, match=f"{ROWS} rows have wrong experts"):
        judge_routing("route", Routing(swapped, weights.exact.float()), inputs)


@st.composite
def mlps(draw: Any, width: int = 6) -> MLPSpec:
    gated = draw(booleans)
    clamp = draw(st.sampled_from(("no", "before", "after", "tanh"))) if gated else "no"
    return MLPSpec(
        width,
        activation=draw(st.sampled_from(("silu", "gelu", "gelu_tanh", "relu", "relu2"))),
        gated=gated,
        clamp=clamp,
        limit=0.75 if clamp != "no" else torch.inf,
        up_limit=draw(st.sampled_from((0.0, 1.25))) if clamp != "no" else 0.0,
        alpha=draw(st.sampled_from((1.0, 1.7))),
        up_offset=draw(st.sampled_from((0.0, 1.0))) if gated else 0.0,
        dtype=draw(st.sampled_from(("input", "float32"))),
        bias=draw(booleans),
        weight_on=draw(st.sampled_from(("output", "input", "w2_input"))),
        output_norm=draw(st.sampled_from((0.0, 0.125))),
    )


def values(shapes: dict[str, tuple[int, ...]], random: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Exact in every dtype: bfloat16 values."""
    found = {}
    for name, shape in shapes.items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        found[name] = (torch.randn(shape, generator=random) * spread + ("norm" in name)).to(BF16).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@EVERY
@given(mlps(), st.sampled_from((0, 2)), st.sampled_from((1.0, 2.5)), seeds)
def test_experts_of_the_reference_are_within_the_bound(
    dtype: torch.dtype, mlp: MLPSpec, identity: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(5 + identity, generator=random)[:3] for _ in range(ROWS)])
    ids = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.2, -1)
    weights = torch.rand(ids.shape, generator=random).to(BF16).to(torch.promote_types(dtype, FP32))
    tensors = values(mlp.tensors("experts", 8, (5,)), random, dtype)
    x = (torch.randn(ROWS, 8, generator=random) * 2).to(BF16).to(dtype)
    inputs = ExpertsInputs(x, mlp, tensors, ids, weights, output_scale=scale, identity_experts=identity)
    want, bound = expected_experts(inputs)
    compare.close("routed sum", experts(inputs), want, bound)
    if dtype == FP64:
        torch.testing.assert_close(experts(inputs), want, rtol=1e-11, atol=1e-12)


@st.composite
def layers(draw: Any) -> LayerSpec:
    routing, count = draw(plain_routings())
    routing = replace(routing, capacity=None)
    kind = draw(st.sampled_from(("none", "shared", "latent", "dense", "norms")))
    shared = None
    if kind in ("shared", "latent") or routing.shared_classes:
        weighted = routing.shared_classes > 0
        mlp = replace(draw(mlps(8)), output_norm=0.0, bias=False)
        if weighted:  # as inkling has them: the reference takes shared experts' weights nowhere else
            mlp = replace(mlp, gated=True, weight_on="w2_input")
        shared = SharedSpec(
            mlp,
            count=2,
            weighted=weighted,
            gate=not weighted and draw(booleans),
            combine=draw(st.sampled_from(("sum", "average"))),
        )
    plain = replace(draw(mlps(8)), output_norm=0.0, weight_on="output")
    dense = DenseSpec(plain, norm_eps=0.125 if kind == "norms" else 0.0) if kind in ("dense", "norms") else None
    return LayerSpec(
        10,
        count,
        LogitsSpec(),
        routing,
        draw(mlps()),
        shared=shared,
        latent=LatentSpec(6, norm_eps=draw(st.sampled_from((0.0, 0.125))), bias=draw(booleans))
        if kind == "latent"
        else None,
        dense=dense,
        output_scale=draw(st.sampled_from((1.0, 2.5))),
        combine_dtype=draw(st.sampled_from(("input", "float32"))),
        output_bias=draw(booleans),
        output_norm=draw(st.sampled_from((0.0, 0.125))),
    )


def layer_inputs(spec: LayerSpec, seed: int, dtype: torch.dtype) -> LayerInputs:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, spec.hidden_size, generator=random).to(BF16).to(dtype)
    logits = (torch.randn(ROWS, spec.classes, generator=random) * 2).to(BF16).to(FP32 if dtype != FP64 else FP64)
    shapes = {name: shape for name, shape in spec.tensors().items() if name != "router.proj"}
    return LayerInputs(x, logits, spec, values(shapes, random, dtype))


@EVERY
@given(layers(), seeds)
def test_layers_in_float64_are_the_reference_s(spec: LayerSpec, seed: int) -> None:
    inputs = layer_inputs(spec, seed, FP64)
    ids, weights, shared = route_logits(inputs.logits, spec.routing, inputs.tensors)
    want = experts_output(inputs.x, spec, inputs.tensors, ids, weights, shared)
    got = layer_value(inputs.x, spec, inputs.tensors, ids, weights, Storage.stored(FP64), shared)
    torch.testing.assert_close(got.exact, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@EVERY
@given(layers(), seeds)
def test_layers_of_the_reference_are_within_the_bound(dtype: torch.dtype, spec: LayerSpec, seed: int) -> None:
    inputs = layer_inputs(spec, seed, dtype)
    try:
        want, bound = expected_layer(inputs)
    except ValueError:
        assume(False)
    compare.close("layer output", moe_layer(inputs), want, bound)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@EVERY
@given(
    st.builds(
        LogitsSpec,
        kind=st.sampled_from(("linear", "gemma4", "zaya")),
        bias=booleans,
        dtype=st.sampled_from(("input", "float32")),
        norm_eps=st.sampled_from((1e-6, 0.5)),
        width=st.just(6),
        takes_state=booleans,
    ),
    seeds,
)
def test_logits_of_the_reference_are_within_the_bound(dtype: torch.dtype, spec: LogitsSpec, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    layer = LayerSpec(10, 7, spec, RoutingSpec(2), MLPSpec(4))
    tensors = values({n: s for n, s in layer.tensors().items() if n.startswith("router")}, random, dtype)
    x, state = ((torch.randn(ROWS, width, generator=random) * 2).to(BF16).to(dtype) for width in (10, 6))
    passed = state if spec.kind == "zaya" and spec.takes_state and seed % 2 else None
    want, (got, _) = logits_value(x, spec, tensors, passed), router_logits(x, spec, tensors, state=passed)
    compare.close("logits", got, want.exact, want.bound("the router's roundings"))
    if dtype == FP64:
        torch.testing.assert_close(got, want.exact, rtol=1e-11, atol=1e-12)
