"""Bounds of whole layers: correct ones stay below, planted faults exceed them, float64 agrees with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.model.specs import DenseSpec, LatentSpec, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, SharedSpec
from moe_conformance.oracle.activation import activated
from moe_conformance.oracle.layer import layer_bound, layer_value
from moe_conformance.oracle.precision import unit_roundoff, wide
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl.layer import experts_output

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H, E, K, T = 20, 5, 3, 7


def mlp(width: int = 10, **given: Any) -> MLPSpec:
    return MLPSpec(width, **given)


def layer(experts: MLPSpec | None = None, routing: RoutingSpec | None = None, **given: Any) -> LayerSpec:
    return LayerSpec(H, E, LogitsSpec(), routing or RoutingSpec(K), experts or mlp(), **given)


SPECS = {
    "silu": layer(),
    "gelu": layer(mlp(activation="gelu")),
    "gelu-tanh": layer(mlp(activation="gelu_tanh")),
    "relu": layer(mlp(activation="relu", gated=False, bias=True)),
    "relu2": layer(mlp(activation="relu2", gated=False)),
    "alpha-offset-bias": layer(mlp(clamp="before", limit=1.5, alpha=1.702, up_offset=1.0, bias=True)),
    "clamp-before": layer(mlp(clamp="before", limit=1.25)),
    "clamp-after": layer(mlp(clamp="after", limit=0.75, dtype="float32")),
    "clamp-tanh": layer(mlp(clamp="tanh", limit=2.0, up_limit=1.5)),
    "weight-on-input": layer(mlp(weight_on="input")),
    "latent-norms": layer(mlp(output_norm=1e-5), latent=LatentSpec(12, norm_eps=1e-5)),
    "latent-scale": layer(
        mlp(activation="relu2", gated=False),
        latent=LatentSpec(12, bias=True),
        output_scale=2.7,
        shared=SharedSpec(mlp(14, activation="relu2", gated=False)),
    ),
    "shared-gate": layer(shared=SharedSpec(mlp(14), gate=True)),
    "shared-average": layer(shared=SharedSpec(mlp(14), count=2, combine="average"), combine_dtype="float32"),
    "shared-weighted": layer(
        routing=RoutingSpec(K, score="sigmoid", shared_classes=2, global_scale=True),
        shared=SharedSpec(mlp(14, weight_on="w2_input"), count=2, weighted=True),
    ),
    "dense": layer(dense=DenseSpec(mlp(16))),
    "dense-norms": layer(mlp(activation="gelu_tanh"), dense=DenseSpec(mlp(16, activation="gelu_tanh"), norm_eps=1e-6)),
    "output-bias-norm": layer(output_bias=True, output_norm=1e-6),
    "identity-experts": layer(routing=RoutingSpec(K, identity_experts=2)),
}


class Built:
    """Inputs of a layer, exact in every dtype: bfloat16 values that float16 holds too."""

    def __init__(self, spec: LayerSpec, seed: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(BF16).to(dtype)

        self.spec = spec
        self.tensors = {n: normal(*s, scale=s[-1] ** -0.5 if len(s) > 1 else 1.0) for n, s in spec.tensors().items()}
        self.x = normal(T, spec.hidden_size)
        last = spec.num_experts + spec.routing.identity_experts
        self.ids = torch.stack([torch.randperm(last + 1, generator=random)[:K] for _ in range(T)])
        self.ids = self.ids.where(self.ids < last, -1)
        self.weights = normal(T, K).abs().to(wide(dtype))
        self.shared = normal(T, 2).abs().to(wide(dtype)) if spec.shared and spec.shared.weighted else None

    def value(self, storage: Storage) -> Value:
        return layer_value(self.x, self.spec, self.tensors, self.ids, self.weights, storage, self.shared)

    def output(self) -> Tensor:
        return experts_output(self.x, self.spec, self.tensors, self.ids, self.weights, self.shared)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_float64_layer_is_the_reference_s(spec: LayerSpec) -> None:
    built = Built(spec, 0, FP64)
    want = built.output()
    assert float((built.value(Storage.stored(FP64)).exact - want).abs().max()) <= 2e-14 * float(want.abs().max())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_correct_layer_stays_below_its_bound_and_not_far_below(spec: LayerSpec, dtype: torch.dtype) -> None:
    """Over many seeds at most half of it; in low precision, where stores dominate, at least a tenth."""
    ratios = []
    for seed in range(4):
        built = Built(spec, seed, dtype)
        exact = built.value(Storage.stored(dtype))
        ratios.append(float(((built.output().double() - exact.exact).abs() / exact.limit).max()))
    assert max(ratios) < 0.5
    assert dtype == FP32 or max(ratios) > 0.1


def test_no_tokens_have_an_empty_bound() -> None:
    built = Built(SPECS["silu"], 0, BF16)
    bound = layer_bound(built.x[:0], built.spec, built.tensors, built.ids[:0], built.weights[:0], Storage.stored(BF16))
    assert bound.limit.shape == (0, H)


def without_last(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The last product of every sum of that projection left out."""
    cut = tensors[name].clone()
    cut[..., -1] = 0
    return {**tensors, name: cut}


FAULTS: dict[str, tuple[str, Callable[[Built], Tensor]]] = {
    "last-product-of-w13": ("silu", lambda b: faulty(b, tensors=without_last(b.tensors, "experts.w13"))),
    "last-product-of-w2": ("silu", lambda b: faulty(b, tensors=without_last(b.tensors, "experts.w2"))),
    "one-wrong-expert": ("silu", lambda b: faulty(b, ids=torch.cat([(b.ids[:1] + 1) % E, b.ids[1:]]))),
    "weights-not-normalised": ("silu", lambda b: faulty(b, weights=b.weights * 0.8)),
    "scale-forgotten": ("latent-scale", lambda b: faulty(b, spec=replace(b.spec, output_scale=1.0))),
    "clamp-forgotten": ("clamp-before", lambda b: faulty(b, spec=replace(b.spec, experts=mlp()))),
    "offset-forgotten": (
        "alpha-offset-bias",
        lambda b: faulty(b, spec=replace(b.spec, experts=replace(b.spec.experts, up_offset=0.0))),
    ),
    "bias-forgotten": (
        "alpha-offset-bias",
        lambda b: faulty(b, tensors={**b.tensors, "experts.b2": 0 * b.tensors["experts.b2"]}),
    ),
    "gate-forgotten": (
        "shared-gate",
        lambda b: faulty(b, spec=replace(b.spec, shared=SharedSpec(mlp(14)))),
    ),
}


def faulty(built: Built, **changed: Any) -> Tensor:
    given = {"spec": built.spec, "tensors": built.tensors, "ids": built.ids, "weights": built.weights, **changed}
    return experts_output(built.x, **given, shared_weights=built.shared)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_exceeds_the_bound(fault: str, dtype: torch.dtype) -> None:
    name, path = FAULTS[fault]
    for seed in range(3):
        built = Built(SPECS[name], seed, dtype)
        exact = built.value(Storage.stored(dtype))
        with pytest.raises(Nonconformance, match=r"times the bound \(derived: r"):
            compare.close("output", path(built), exact.exact, exact.bound("r"))


@pytest.mark.parametrize(("dtype", "caught"), [(FP32, True), (BF16, False)])
def test_a_wrong_gelu_shows_in_float32_alone(dtype: torch.dtype, caught: bool) -> None:
    """Its difference, 5e-4 at most, is below the roundings of bfloat16: formulas need a float32 tier."""
    ratios = []
    for seed in range(5):
        built = Built(SPECS["gelu-tanh"], seed, dtype)
        exact = built.value(Storage.stored(dtype))
        got = faulty(built, spec=SPECS["gelu"])
        ratios.append(float(((got.double() - exact.exact).abs() / exact.limit).max()))
    assert (min(ratios) > 10) if caught else (max(ratios) < 1)


def test_a_wrong_gelu_shows_in_any_precision_on_exact_inputs() -> None:
    spec, gate = mlp(activation="gelu_tanh", gated=False), torch.linspace(-6, 6, 4001)[:, None].to(BF16)
    stage = activated(Value.of(gate), None, spec, Storage.stored(BF16))
    right, wrong = (torch.nn.functional.gelu(gate, approximate=form) for form in ("tanh", "none"))
    compare.close("activation", right, stage.exact, stage.bound(""))
    with pytest.raises(Nonconformance):
        compare.close("activation", wrong, stage.exact, stage.bound(""))


def test_a_storage_without_a_store_that_a_path_makes_condemns_it() -> None:
    built = Built(replace(SPECS["silu"], experts=mlp(256)), 0, BF16)
    built.ids, built.weights = built.ids % E, torch.ones_like(built.weights)
    whole, without = (
        built.value(storage)
        for storage in (Storage.stored(BF16), replace(Storage.stored(FP32), result=BF16, weights=BF16))
    )
    error = (built.output().double() - whole.exact).abs()
    assert float((error / whole.limit).max()) < 0.5
    assert float((error / without.limit).max()) > 1


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_bound_is_linear_in_u(dtype: torch.dtype) -> None:
    """Of storages that differ in u alone; up to products of errors, which bfloat16 has of some size."""
    built = Built(SPECS["silu"], 0, FP32)
    narrow = built.value(replace(Storage.stored(dtype), compute=dtype)).spread
    single = built.value(Storage.stored(FP32)).spread
    assert torch.allclose(
        narrow / single, torch.full_like(single, unit_roundoff(dtype) / unit_roundoff(FP32)), rtol=0.2
    )
