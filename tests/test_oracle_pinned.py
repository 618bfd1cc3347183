"""The bounds themselves, to nine digits: whoever changes how roundings are counted sees here what that moves.

Other tests hold bounds between what correct paths need and what faults cost, which leaves room. Inputs are hashed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import (
    DenseSpec,
    ExpertsInputs,
    LatentSpec,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RoutingSpec,
    SharedSpec,
    integers,
    normal,
)
from moe_conformance.oracle.experts import expected_experts, expected_parts
from moe_conformance.oracle.layer import layer_value
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.scores import compared_value
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value

BF16, FP32 = torch.bfloat16, torch.float32
T, E, H, F, K = 5, 6, 12, 8, 3


def named(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: normal(s, f"pinned-{n}", dtype, 0.5) + ("norm" in n or "scale" in n) for n, s in shapes.items()}


def x(width: int = H, dtype: torch.dtype = BF16) -> Tensor:
    return normal((T, width), f"pinned-x-{width}", dtype)


ROUTERS = {
    "linear": LogitsSpec(bias=True),
    "float32": LogitsSpec(dtype="float32"),
    "gemma4": LogitsSpec("gemma4", norm_eps=0.5),
    "zaya": LogitsSpec("zaya", width=6, takes_state=True, bias=True),
}


def logits_of(name: str) -> Value:
    spec = LayerSpec(H, E, ROUTERS[name], RoutingSpec(K), MLPSpec(F))
    tensors = named({n: s for n, s in spec.tensors().items() if n.startswith("router")}, BF16)
    state = x(6) if spec.logits.takes_state else None
    return logits_value(x(), spec.logits, tensors, state)


ROUTINGS = {
    "softmax": RoutingSpec(K, logit_scale=1.7, score_dtype="input"),
    "biased": RoutingSpec(K, selection_bias=True, renormalize="sum", epsilon=1e-3, scale=2.7),
    "sigmoid": RoutingSpec(K, score="sigmoid", logit_softcap=2.5, selection_bias=True, renormalize="sum", floor=0.5),
    "softplus": RoutingSpec(K, score="sqrt_softplus", score_dtype="input", renormalize="norm", norm_order=3.0),
    "logits": RoutingSpec(K, select_on="logits", selection_bias=True, per_expert_scale=True),
    "shared": RoutingSpec(K, score="sigmoid", shared_classes=2, global_scale=True, per_expert_scale=True, scale=1.5),
    "mixer": RoutingSpec(2, selector="sparsemixer", jitter=0.25, select_on="logits", score_dtype="input"),
    "keys": RoutingSpec(K, selector="product_keys", select_on="logits", renormalize="sum"),
}


def routing_of(name: str) -> tuple[Tensor, RoutingSpec, dict[str, Tensor]]:
    spec = ROUTINGS[name]
    classes = 6 if spec.selector == "product_keys" else spec.classes(E)
    experts = 9 if spec.selector == "product_keys" else E
    tensors = named({"router.per_expert_scale": (E,), "router.global_scale": (1,)}, BF16)
    tensors["router.selection_bias"] = normal((experts,), "pinned-bias", FP32, 0.25)
    return normal((T, classes), f"pinned-logits-{classes}", BF16, 2.0), spec, tensors


def compared_of(name: str) -> Value:
    return compared_value(*routing_of(name), BF16)


def weights_of(name: str) -> Value:
    logits, spec, tensors = routing_of(name)
    ids = compared_of(name).exact.argsort(-1, descending=True)[:, : spec.top_k]
    dropped = integers(ids.shape, "pinned-dropped", 4) == 0
    dropped[0] = False
    weights, shared = weights_value(logits, ids, spec, tensors, BF16, dropped, stored=FP32)
    return weights if shared is None else Value.cat([weights, shared])


def mlp(**given: object) -> MLPSpec:
    return MLPSpec(F, **given)  # type: ignore[arg-type]


LAYERS = {
    "silu": mlp(),
    "oai": mlp(clamp="before", limit=0.75, alpha=1.7, up_offset=1.0, bias=True),
    "after": mlp(clamp="after", limit=0.5, dtype="float32"),
    "tanh": mlp(clamp="tanh", limit=0.75, up_limit=1.25),
    "plain": mlp(activation="gelu_tanh", gated=False, bias=True),
    "on-input": mlp(activation="gelu", weight_on="input"),
    "on-w2-input": mlp(activation="relu2", weight_on="w2_input"),
    "norm": mlp(activation="relu", output_norm=0.25),
}
AROUND: dict[str, Callable[[LayerSpec], LayerSpec]] = {
    "shared-gate": lambda s: replace(s, shared=SharedSpec(mlp(), gate=True), combine_dtype="float32"),
    "shared-average": lambda s: replace(s, shared=SharedSpec(mlp(), combine="average"), output_scale=1.7),
    "shared-weighted": lambda s: replace(s, shared=SharedSpec(mlp(weight_on="w2_input"), count=2, weighted=True)),
    "latent": lambda s: replace(s, latent=LatentSpec(6, norm_eps=0.25, bias=True), output_scale=1.7),
    "dense": lambda s: replace(s, dense=DenseSpec(mlp())),
    "dense-norms": lambda s: replace(s, dense=DenseSpec(mlp(), norm_eps=0.25)),
    "output": lambda s: replace(s, output_bias=True, output_norm=0.25),
    "identity": lambda s: replace(s, routing=replace(s.routing, identity_experts=2)),
}


def layer_of(name: str) -> Value:
    spec = LayerSpec(H, E, LogitsSpec(), RoutingSpec(K), LAYERS.get(name, mlp()))
    spec = AROUND[name](spec) if name in AROUND else spec
    tensors = named({n: s for n, s in spec.tensors().items() if n != "router.proj"}, BF16)
    ids = integers((T, 9), "pinned-ids", 1000).argsort(-1)[:, :K]
    ids = ids.where(ids < E + spec.routing.identity_experts, -1)
    weights, shared = (normal((T, n), f"pinned-weights-{n}", FP32) for n in (K, 2))
    weighted = spec.shared is not None and spec.shared.weighted
    storage = Storage.stored(BF16)
    return layer_value(x(), spec, tensors, ids, weights, storage, shared if weighted else None)


def experts_of(name: str) -> tuple[Tensor, Tensor]:
    spec = LAYERS["oai"]
    ids = integers((T, 9), "pinned-ids", 1000).argsort(-1)[:, :K].clamp(max=E)
    weights = normal((T, K), "pinned-weights", FP32)
    inputs = ExpertsInputs(x(), spec, named(spec.tensors("experts", H, (E,)), BF16), ids, weights, output_scale=1.7)
    inputs = replace(inputs, identity_experts=1)
    match name:
        case "stored":
            found = expected_experts(inputs)
        case "fused":
            found = expected_experts(inputs, Storage.fused(BF16))
        case _:
            shared = named(mlp().tensors("shared", H), BF16)
            found = expected_parts(inputs, mlp(), shared, 2, 3)
    return found[0], found[1].limit


def digits(*tensors: Tensor) -> list[float]:
    """The sum of each, weighted so that elements are told apart."""
    return [float((t * torch.arange(1, t.numel() + 1).reshape(t.shape)).sum()) for t in tensors]


def of_value(value: Value) -> list[float]:
    return digits(value.exact, value.spread, value.limit)


FOUND: dict[str, Callable[[], list[float]]] = {
    **{f"logits-{name}": lambda name=name: of_value(logits_of(name)) for name in ROUTERS},
    **{f"compared-{name}": lambda name=name: of_value(compared_of(name)) for name in ROUTINGS},
    **{f"weights-{name}": lambda name=name: of_value(weights_of(name)) for name in ROUTINGS},
    **{f"layer-{name}": lambda name=name: of_value(layer_of(name)) for name in (*LAYERS, *AROUND)},
    **{f"experts-{name}": lambda name=name: digits(*experts_of(name)) for name in ("stored", "fused", "parts")},
}

# Name -> the exact value, its spread and its limit; of experts the exact value and the limit.
PINNED: dict[str, tuple[float, ...]] = {
    "logits-linear": (-207.6914062, 4.857597392, 6.754150931),
    "logits-float32": (-177.9257812, 0.0003547462028, 0.001313980378),
    "logits-gemma4": (4.543404881, 1.873732746, 9.053513792),
    "logits-zaya": (-39.23635177, 4.986061857, 24.42898171),
    "compared-softmax": (-326.71875, 14.6536677, 30.58063965),
    "compared-biased": (-11.5293852, 2.61854206e-05, 8.153807632e-05),
    "compared-sigmoid": (107.0338348, 4.050399061e-05, 0.000149032502),
    "compared-softplus": (373.8735318, 4.130757963, 11.68354787),
    "compared-logits": (-281.875, 5.604419857e-05, 5.604419857e-05),
    "compared-shared": (285.6388554, 4.815511026e-05, 0.0001362032201),
    "compared-mixer": (-192.1875, 0, 0),
    "compared-keys": (-476.0625, 0.0002081058919, 0.0002081058919),
    "weights-softmax": (22.748028, 0.5023158653, 1.236092556),
    "weights-biased": (99.87521152, 4.433507402e-05, 0.0002216753701),
    "weights-sigmoid": (33.2842298, 9.125550469e-06, 4.512670035e-05),
    "weights-softplus": (50.44097788, 1.121918913, 5.609594564),
    "weights-logits": (21.02013699, 6.0520758e-06, 2.010114611e-05),
    "weights-shared": (107.6264996, 2.701422279e-05, 0.0001342331502),
    "weights-mixer": (25.09371515, 0.314797296, 0.6994295594),
    "weights-keys": (37.93419421, 2.088859384e-05, 0.0001044429692),
    "layer-silu": (-1976.135669, 281.0996315, 1395.918741),
    "layer-oai": (-115.1016114, 35.78665964, 176.0638175),
    "layer-after": (-68.63584495, 7.053030024, 33.1808609),
    "layer-tanh": (-215.1690975, 35.4931419, 177.4657095),
    "layer-plain": (-1357.296892, 78.21979963, 387.5141789),
    "layer-on-input": (-5403.764536, 224.572813, 1122.789778),
    "layer-on-w2-input": (-11507.79804, 1703.10031, 8503.79219),
    "layer-norm": (-204.1455974, 36.67828257, 183.3812386),
    "layer-shared-gate": (-2197.451789, 306.3190445, 1530.799472),
    "layer-shared-average": (-1846.187458, 266.6128126, 1332.547401),
    "layer-shared-weighted": (109.067316, 354.4880273, 1769.406284),
    "layer-latent": (2174.771142, 839.0768063, 4195.384032),
    "layer-dense": (-1396.171093, 333.6708678, 1662.666041),
    "layer-dense-norms": (150.3984398, 51.152306, 255.76153),
    "layer-output": (-438.8655746, 27.64881792, 138.1664649),
    "layer-identity": (-2192.602466, 282.6389014, 1403.878048),
    "experts-stored": (-933.0339987, 285.9878678),
    "experts-fused": (-933.0339987, 105.114184),
    "experts-parts": (-1265.978277, 966.5780706),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_bound_is_what_it_was(name: str) -> None:
    assert FOUND[name]() == pytest.approx(PINNED[name], rel=1e-8)
