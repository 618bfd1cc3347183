"""Which experts and weights a correct router may give: the reference's, near ties, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.model.specs import Capacity, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.oracle.choice import accepted
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.scores import compared_value, softmax
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import route_logits

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
U32, TINY32 = 2**-24, 2**-126

ROUTING = {
    "softmax": RoutingSpec(3),
    "renormalised": RoutingSpec(3, renormalize="sum", scale=2.5),
    "norm": RoutingSpec(3, score_dtype="input", renormalize="norm", norm_order=2.0),
    "logits": RoutingSpec(3, select_on="logits"),
    "biased-logits": RoutingSpec(3, select_on="logits", score="sigmoid", renormalize="sum", selection_bias=True),
    "sigmoid": RoutingSpec(3, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-2, scale=2.7),
    "groups": RoutingSpec(3, score="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="top2_sum"),
    "groups-max": RoutingSpec(3, groups=4, top_groups=2, group_mask=0.0),
    "softplus": RoutingSpec(3, score="sqrt_softplus", score_dtype="input", selection_bias=True, renormalize="sum"),
    "floor": RoutingSpec(3, selection_bias=True, renormalize="sum", floor=0.6),
    "softcap": RoutingSpec(3, score="sigmoid", selection_bias=True, logit_softcap=2.0, logit_scale=0.7),
    "expert-scale": RoutingSpec(3, renormalize="sum", per_expert_scale=True),
    "shared-classes": RoutingSpec(3, score="sigmoid", shared_classes=2, selection_bias=True, global_scale=True),
    "sparsemixer": RoutingSpec(2, selector="sparsemixer", jitter=0.1, select_on="logits"),
    "product-keys": RoutingSpec(3, selector="product_keys", select_on="logits"),
}
CLASSES = 12


def routing_inputs(spec: RoutingSpec, dtype: torch.dtype, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    keys = spec.selector == "product_keys"
    logits = torch.randn(64, 8 if keys else CLASSES + spec.shared_classes, generator=random) * 3
    tensors = {
        "router.selection_bias": torch.randn(CLASSES, generator=random) / 2,
        "router.per_expert_scale": torch.rand(CLASSES, generator=random) + 0.5,
        "router.global_scale": torch.rand(1, generator=random) + 0.5,
    }
    return logits.to(dtype), {name: t if "bias" in name else t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("spec", ROUTING.values(), ids=ROUTING.keys())
def test_a_correct_router_is_accepted_and_its_weights_are_within_half_their_bound(
    spec: RoutingSpec, dtype: torch.dtype
) -> None:
    for seed in range(3):
        logits, tensors = routing_inputs(spec, dtype, seed)
        got = route_logits(logits, spec, tensors)
        compared = compared_value(logits, spec, tensors, dtype)
        assert accepted(got.ids, compared, spec).all()
        weights, shared = weights_value(logits, got.ids, spec, tensors, dtype)
        pairs = [(weights, got.weights)] + ([] if shared is None else [(shared, got.shared)])
        for exact, mine in pairs:
            ratio = (mine.double() - exact.exact).abs() / exact.limit
            assert float(ratio.max()) < 0.5
        if dtype == FP64:
            assert torch.allclose(weights.exact, got.weights, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [n for n, s in ROUTING.items() if s.score_dtype == "float32"])
def test_the_next_best_expert_is_refused_unless_it_nearly_ties(name: str) -> None:
    """Float32 scores a swap of k and k+1 for at most one token in a hundred."""
    spec = ROUTING[name]
    logits, tensors = routing_inputs(spec, FP32, 0)
    compared = compared_value(logits, spec, tensors, FP32)
    best = route_logits(logits.double(), spec, {n: t.double() for n, t in tensors.items()}).ids
    score = compared.exact.scatter(1, best, -math.inf)
    swapped = torch.cat([best[:, :-1], score.argmax(-1, keepdim=True)], dim=-1)
    assert accepted(best, compared, spec).all()
    assert accepted(swapped, compared, spec).double().mean() <= 0.01


def scored(*rows: list[float], limit: float) -> Value:
    exact = torch.tensor(rows, dtype=FP64)
    return Value(exact, torch.full_like(exact, 1e6), torch.full_like(exact, limit))


def takes(compared: Value, spec: RoutingSpec, *ids: int) -> bool:
    return bool(accepted(torch.tensor([ids]), compared, spec))


def test_a_set_is_right_where_both_errors_bridge_the_gap() -> None:
    compared = scored([3.0, 2.0, 0.0], limit=0.5)
    assert takes(compared, RoutingSpec(1), 0)
    assert takes(compared, RoutingSpec(1), 1)
    assert not takes(scored([3.0, 2.0, 0.0], limit=0.49), RoutingSpec(1), 1)
    assert takes(compared, RoutingSpec(2), 1, 0)
    assert not takes(compared, RoutingSpec(2), 0, 2)


def test_a_set_is_right_only_within_groups_that_may_be_the_best() -> None:
    row = [5.0, 0.0, 4.0, 3.0]
    by_sum = RoutingSpec(2, groups=2, group_score="top2_sum")
    by_max = replace(by_sum, group_score="max")
    assert takes(scored(row, limit=0.1), by_sum, 2, 3)
    assert not takes(scored(row, limit=0.1), by_sum, 0, 2)
    assert not takes(scored(row, limit=0.1), by_sum, 0, 1)
    assert takes(scored(row, limit=0.1), by_max, 0, 1)
    assert not takes(scored(row, limit=0.1), by_max, 2, 3)
    assert takes(scored(row, limit=0.5), by_sum, 0, 1)  # sums 5 and 7, each off by 1
    assert not takes(scored(row, limit=0.49), by_sum, 0, 1)
    assert takes(scored(row, limit=0.5), by_max, 2, 3)
    assert not takes(scored(row, limit=0.49), by_max, 2, 3)
    assert takes(scored(row, limit=0.1), replace(by_max, top_groups=2), 0, 2)
    assert takes(scored(row, limit=0.1), replace(by_max, group_mask=0.0), 0, 3)  # 1 and 3 both count as 0
    assert not takes(scored(row, limit=0.1), replace(by_max, group_mask=-1.0), 0, 3)


def test_probabilities_that_underflow_tie_and_their_logits_do_not() -> None:
    logits, scores = torch.tensor([[0.0, -200.0, -300.0]]), RoutingSpec(2)
    for spec, tied in ((scores, True), (replace(scores, select_on="logits"), False)):
        compared = compared_value(logits, spec, {}, FP32)
        assert takes(compared, spec, 0, 1)
        assert takes(compared, spec, 0, 2) is tied


def test_softmax_scores_are_compared_in_the_order_of_their_logits() -> None:
    compared = compared_value(torch.tensor([[1.0, 3.0]]), RoutingSpec(1), {}, FP32)
    assert compared.exact.tolist() == [[1.0, 3.0]]
    # The numerator's exponent is 2 below the largest, exp and division are 5 u.
    assert compared.limit.tolist() == [[7 * U32, 5 * U32]]
    assert compared.spread[0].tolist() == pytest.approx([3 * U32, 5**0.5 * U32])


def test_a_softmax_has_errors_of_its_numerator_its_denominator_and_a_logarithm_of_both() -> None:
    even, log = softmax(Value.of(torch.zeros(1, 2)), FP32), math.log(2)
    assert even.exact.tolist() == [[0.5, 0.5]]
    limit = 0.5 * math.expm1((0.5 * 4 + 0.5 * 4 + 2 + 2 + log) * U32) + TINY32
    assert even.limit[0].tolist() == pytest.approx([limit, limit], rel=1e-12)
    spread = 0.5 * math.expm1(5 * math.sqrt(1 + 1 + 2 + 2 + log**2) * U32) / 5 + TINY32
    assert even.spread[0].tolist() == pytest.approx([spread, spread], rel=1e-12)
    shifted = softmax(Value.of(torch.zeros(1, 2)), FP32, shift=-1024.0)
    assert shifted.limit[0, 0].item() == pytest.approx(0.5 * math.expm1((8 + log + 1024) * U32) + TINY32, rel=1e-12)
    rough = Value(torch.zeros(1, 2, dtype=FP64), torch.tensor([[0.01, 0.02]], dtype=FP64))
    spread = 0.5 * math.expm1(5 * math.hypot(0.005, 0.01)) / 5
    assert softmax(rough, FP64).spread[0, 0].item() == pytest.approx(spread, rel=1e-9)
    apart = softmax(Value.of(torch.tensor([[0.0, 3.0]])), FP32)  # the first exponent is 3 below, and exp adds 4 u
    low, high = apart.exact[0].tolist()
    limit = low * math.expm1(((1 - low) * 7 + high * 4 + 4 + math.log(1 + math.e**3)) * U32) + TINY32
    assert apart.limit[0, 0].item() == pytest.approx(limit, rel=1e-9)
    sure = softmax(scored([0.0, 9.0], limit=0.01), FP64)
    p = sure.exact[0, 1].item()
    assert sure.limit[0, 1].item() == pytest.approx(p * math.expm1((1 - p) * 0.02), rel=1e-9)


def test_a_narrow_softmax_sums_in_float32_and_stores_twice() -> None:
    even, u = softmax(Value.of(torch.zeros(1, 512)), BF16), 2**-8
    sums = 8 * 511 / 512 + 512 * U32 / u + 2 + math.log(512)  # each of 512 exponentials is off by 4 u
    assert even.limit[0, 0].item() == pytest.approx(math.expm1(sums * u) / 512, rel=1e-9)


def test_pairs_without_room_have_no_weight_before_or_after_the_rest_is_normalised() -> None:
    spec, logits, ids = RoutingSpec(2, renormalize="sum"), torch.zeros(1, 4), torch.tensor([[0, 1]])
    dropped = torch.tensor([[False, True]])
    late = replace(spec, capacity=Capacity(renormalize_before=True))
    early = replace(spec, capacity=Capacity())
    for given, want in ((early, [1.0, 0.0]), (late, [0.5, 0.0])):
        weights, shared = weights_value(logits, ids, given, {}, FP32, dropped)
        assert weights.exact.tolist() == [want]
        assert shared is None
        assert weights.limit[0, 1] < TINY32
    assert weights_value(logits, ids, spec, {}, FP32)[0].exact.tolist() == [[0.5, 0.5]]


def test_a_logit_at_the_limit_of_the_sparse_mixer_may_be_in_or_out() -> None:
    spec = RoutingSpec(1, selector="sparsemixer", jitter=0.125, select_on="logits")
    ids, inside = torch.tensor([[0]]), 1 / (1 + math.exp(-0.25))
    at_limit = weights_value(torch.tensor([[1.0, 0.75, -9.0]]), ids, spec, {}, FP32)[0]
    assert at_limit.exact.item() == pytest.approx(inside)
    assert at_limit.limit.item() == pytest.approx(1 - inside, rel=1e-5)
    for other in (0.7501, 0.7499):
        decided = weights_value(torch.tensor([[1.0, other, -9.0]]), ids, spec, {}, FP32)[0]
        assert decided.limit.item() < 1e-5


def test_logits_of_the_sparse_mixer_may_be_of_any_size() -> None:
    """The second choice is weighed as if the first were not there, however far below 0 all of them are."""
    spec = RoutingSpec(2, selector="sparsemixer", jitter=0.125, select_on="logits")
    for size in (-9.0, -9_999.0, -10_000.0, -1e6):
        logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]], dtype=FP64) + size
        got = route_logits(logits, spec, {})
        assert got.ids.tolist() == [[0, 1]]
        weights, _ = weights_value(logits, got.ids, spec, {}, FP64)
        torch.testing.assert_close(weights.exact, got.weights, rtol=1e-12, atol=0)


ROUTERS = {
    "linear": LogitsSpec(bias=True),
    "in-float32": LogitsSpec(dtype="float32"),
    "gemma4": LogitsSpec("gemma4"),
    "zaya": LogitsSpec("zaya", width=6, takes_state=True, bias=True),
}


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS.keys())
def test_logits_of_a_correct_router_are_within_their_bound(spec: LogitsSpec, dtype: torch.dtype) -> None:
    layer, ratios = LayerSpec(20, CLASSES, spec, RoutingSpec(3), MLPSpec(4)), []
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, random: torch.Generator = random) -> Tensor:
            return (torch.randn(shape, generator=random) / math.sqrt(shape[-1])).to(BF16).to(dtype)

        tensors = {n: normal(*shape) for n, shape in layer.tensors().items() if n.startswith("router")}
        x, state = normal(7, 20) * 4, normal(7, 6) * 2 if spec.takes_state else None
        exact, (got, _) = logits_value(x, spec, tensors, state), router_logits(x, spec, tensors, state=state)
        ratios.append(float(((got.double() - exact.exact).abs() / exact.limit).max()))
        if dtype == FP64:
            assert torch.allclose(exact.exact, got, rtol=1e-13, atol=1e-14)
    assert max(ratios) < 1
    assert dtype != BF16 or spec.dtype == "float32" or max(ratios) > 0.1
