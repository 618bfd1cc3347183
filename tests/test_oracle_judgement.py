"""The judgement of a router's answer: faults die for their reasons; where correct routers differ, both pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import Capacity, FusedShared, RouteInputs, Routing, RoutingSpec
from moe_conformance.errors import Nonconformance
from moe_conformance.oracle.choice import choose
from moe_conformance.oracle.routing import judge_fused_shared, judge_routing
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl.routing import route_logits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
T, E = 23, 24

V3 = RoutingSpec(
    *(4,),
    score="sigmoid",
    selection_bias=True,
    groups=6,
    top_groups=2,
    group_score="top2_sum",
    renormalize="sum",
    epsilon=1e-20,
    scale=2.5,
)
V2 = RoutingSpec(4, groups=6, top_groups=2, group_mask=0.0, selection_bias=True)
SOFTMAX = RoutingSpec(4, renormalize="sum")
GEMMA4 = replace(SOFTMAX, per_expert_scale=True)
MIXER = RoutingSpec(2, selector="sparsemixer", jitter=0.2, select_on="logits")
SWITCH = RoutingSpec(1, capacity=Capacity(tokens=2))
NLLB = RoutingSpec(2, renormalize="sum", capacity=Capacity(tokens=3, per="batch"))
BEFORE = replace(NLLB, capacity=Capacity(tokens=3, per="batch", renormalize_before=True))
BEST_TWO = RoutingSpec(2)
ZAYA = RoutingSpec(1, selection_bias=True, skip_expert=True)
INKLING = RoutingSpec(3, score="sigmoid", shared_classes=2, global_scale=True, scale=1.5)
TABLE = RoutingSpec(3, score="sqrt_softplus", selector="table", renormalize="sum")
SPECS = {
    "v3": V3,
    "v2": V2,
    "softmax": SOFTMAX,
    "gemma4": GEMMA4,
    "mixer": MIXER,
    "switch": SWITCH,
    "nllb": NLLB,
    "before": BEFORE,
    "by-weight": replace(NLLB, capacity=Capacity(tokens=3, per="batch", by_weight=True)),
    "zaya": ZAYA,
    "inkling": INKLING,
    "table": TABLE,
    "longcat": RoutingSpec(4, selection_bias=True, identity_experts=5, scale=6.0),
    "keys": RoutingSpec(3, selector="product_keys", select_on="logits", renormalize="sum"),
    "norm": RoutingSpec(4, score_dtype="input", renormalize="norm", norm_order=2.0),
}


def built(spec: RoutingSpec, dtype: torch.dtype = FP32, seed: int = 0, tokens: int = T) -> RouteInputs:
    random = torch.Generator().manual_seed(seed)
    classes = 10 if spec.selector == "product_keys" else spec.classes(E)
    tensors = {
        "router.selection_bias": torch.randn(classes - spec.shared_classes, generator=random) / 4,
        "router.per_expert_scale": torch.rand(E, generator=random) + 0.5,
        "router.global_scale": torch.tensor([1.375]),
        "router.table": torch.stack([torch.randperm(E, generator=random)[: spec.top_k] for _ in range(9)]),
    }
    tensors["router.selection_bias"][-1] += spec.skip_expert  # so that some rows skip
    logits = (torch.randn(tokens, classes, generator=random) * 2).to(dtype)
    return RouteInputs(logits, spec, tensors, token_ids=torch.arange(tokens) % 9)


def routed(inputs: RouteInputs) -> Routing:
    """What the reference answers, in float32 unless the scores are narrow."""
    ids, weights, _ = route_logits(
        inputs.logits, inputs.routing, inputs.tensors, token_ids=inputs.token_ids, sequences=inputs.sequences
    )
    return Routing(ids, weights)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", SPECS)
def test_the_reference_passes_in_any_order_of_a_row(name: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        inputs = built(SPECS[name], dtype, seed)
        ids, weights = routed(inputs)
        judge_routing("route", Routing(ids, weights), inputs)
        judge_routing("route", Routing(ids.int().flip(1), weights.flip(1)), inputs)


@pytest.mark.parametrize("name", SPECS)
def test_the_oracle_s_own_choice_is_the_reference_s(name: str) -> None:
    inputs = built(SPECS[name])
    mine, other = choose(inputs, None, FP32), routed(inputs)
    for theirs, ids in zip(other.ids.tolist(), mine.ids.tolist(), strict=True):
        assert {i for i in ids if i >= 0} <= set(theirs)
    order = mine.ids.argsort(-1)
    assert order.shape == other.ids.shape
    judge_routing("route", Routing(mine.ids, mine.weights.exact.float()), inputs)


def weights_of(
    spec: RoutingSpec, change: Callable[[RouteInputs], Tensor]
) -> tuple[RoutingSpec, Callable[..., Routing]]:
    return spec, lambda inputs: Routing(routed(inputs).ids, change(inputs))


def ids_of(spec: RoutingSpec, change: Callable[[RouteInputs], Tensor]) -> tuple[RoutingSpec, Callable[..., Routing]]:
    """Other ids, with the weights that these have."""

    def answer(inputs: RouteInputs) -> Routing:
        ids = change(inputs)
        scores = inputs.logits.sigmoid() if spec.score == "sigmoid" else inputs.logits.softmax(-1)
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) if spec.renormalize == "sum" else weights
        return Routing(ids, weights * spec.scale)

    return spec, answer


def routed_as(spec: RoutingSpec, **changed: object) -> tuple[RoutingSpec, Callable[..., Routing]]:
    """By another method than the one asked for."""
    return spec, lambda inputs: routed(replace(inputs, routing=replace(spec, **changed)))  # type: ignore[arg-type]


def biased_weights(inputs: RouteInputs) -> Tensor:
    biased = inputs.logits.sigmoid() + inputs.tensors["router.selection_bias"]
    found = biased.gather(1, routed(inputs).ids)
    return found / found.sum(-1, keepdim=True) * V3.scale


def next_best(inputs: RouteInputs) -> Tensor:
    """The K best but the last, and the (K + 1)-th."""
    spec = inputs.routing
    return routed(replace(inputs, routing=replace(spec, top_k=spec.top_k + 1))).ids[:, [*range(spec.top_k - 1), -1]]


def twice(inputs: RouteInputs) -> Tensor:
    ids = routed(inputs).ids.clone()
    ids[5, 1] = ids[5, 0]
    return ids


def out_of_range(number: int) -> Callable[[RouteInputs], Tensor]:
    def change(inputs: RouteInputs) -> Tensor:
        ids = routed(inputs).ids.clone()
        ids[7, 2] = number
        return ids

    return change


def narrow_softmax(inputs: RouteInputs) -> Tensor:
    narrow = inputs.logits.bfloat16().softmax(-1)
    weights = narrow.gather(1, routed(inputs).ids)
    return weights / weights.sum(-1, keepdim=True)


# Name -> the method, an answer with a fault, and words of the message.
FAULTS: dict[str, tuple[tuple[RoutingSpec, Callable[..., Routing]], str]] = {
    "the bias in the weights": (weights_of(V3, biased_weights), "wrong weights"),
    "no renormalisation": (routed_as(SOFTMAX, renormalize="no"), "wrong weights"),
    "renormalised though nobody asks": (routed_as(V2, renormalize="sum"), "wrong weights"),
    "the best of a group for its two best": (routed_as(V3, group_score="max"), "wrong experts"),
    "the two best of a group for its best": (routed_as(V2, group_score="top2_sum"), "wrong experts"),
    "one group too many": (routed_as(V3, top_groups=3), "wrong experts"),
    "no bias": (routed_as(V3, selection_bias=False), "wrong experts"),
    "a mask of minus infinity for 0": (routed_as(replace(V2, top_k=8), group_mask=-torch.inf), "wrong experts"),
    "a mask of 0 for minus infinity": (routed_as(replace(V3, top_k=8), group_mask=0.0), "wrong experts"),
    "the scale twice": (weights_of(V3, lambda i: routed(i).weights * 2.5), "wrong weights"),
    "no scale": (routed_as(V3, scale=1.0), "wrong weights"),
    "ids sorted, weights not": (
        (SOFTMAX, lambda i: Routing(routed(i).ids.sort(-1).values, routed(i).weights)),
        "wrong weights",
    ),
    "an expert twice": (
        (SOFTMAX, lambda i: Routing(twice(i), routed(i).weights)),
        r"row 5: got ids .* want 4 different",
    ),
    "an id beyond": (
        (SOFTMAX, lambda i: Routing(out_of_range(E)(i), routed(i).weights)),
        r"ids\[7, 2\]: got 24, want 0 to 23$",
    ),
    "no expert, where each token has K": (
        (SOFTMAX, lambda i: Routing(out_of_range(-1)(i), routed(i).weights)),
        r"ids\[7, 2\]: got -1, want 0 to 23$",
    ),
    "the next best for the last": (ids_of(SOFTMAX, next_best), "left out: .* chosen: "),
    "the next best of the kept groups": (ids_of(V3, next_best), "2 of 6 groups kept"),
    "sigmoid for softmax": (routed_as(SOFTMAX, score="sigmoid"), "wrong weights"),
    "scores of the chosen alone": (routed_as(RoutingSpec(4), select_on="logits"), "wrong weights"),
    "a softmax in bfloat16": (weights_of(SOFTMAX, narrow_softmax), "wrong weights"),
    "the scale of another expert": (
        weights_of(
            GEMMA4, lambda i: routed(replace(i, routing=SOFTMAX)).weights * i.tensors["router.per_expert_scale"][:4]
        ),
        "wrong weights",
    ),
    "nobody dropped": (routed_as(SWITCH, capacity=None), "as far as these have a place"),
    "one place too few": (routed_as(SWITCH, capacity=Capacity(tokens=1)), "as far as these have a place"),
    "tokens in order instead of by weight": (
        routed_as(SPECS["by-weight"], capacity=NLLB.capacity),
        "as far as these have a place",
    ),
    "normalised before tokens are dropped": (routed_as(NLLB, capacity=BEFORE.capacity), "wrong weights"),
    "normalised after tokens are dropped": (routed_as(BEFORE, capacity=NLLB.capacity), "wrong weights"),
    "nobody skips": (
        (ZAYA, lambda i: Routing(routed(i).ids.clamp(min=0), routed(i).weights.clamp(min=0.01))),
        "wrong experts",
    ),
    "another row of the table": (
        (TABLE, lambda i: routed(replace(i, token_ids=(i.token_ids + 1) % 9))),
        "wrong experts",
    ),
    "a narrower threshold": (routed_as(MIXER, jitter=0.02), "wrong weights"),
    "no global scale": (routed_as(INKLING, global_scale=False), "wrong weights"),
    "float ids": ((SOFTMAX, lambda i: Routing(routed(i).ids.float(), routed(i).weights)), "ids: got torch.float32"),
    "one slot too few": (
        (SOFTMAX, lambda i: Routing(routed(i).ids[:, 1:], routed(i).weights[:, 1:])),
        r"ids: got shape \[23, 3\], want \[23, 4\]",
    ),
    "a weight that is no number": (
        weights_of(SOFTMAX, lambda i: routed(i).weights.index_fill(0, torch.tensor([3]), torch.nan)),
        r"1 rows have wrong weights, first \[3, 0\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_dies_for_its_reason(fault: str) -> None:
    (spec, answer), words = FAULTS[fault]
    inputs = built(spec)
    judge_routing("route", routed(inputs), inputs)
    with pytest.raises(Nonconformance, match=words):
        judge_routing("route", answer(inputs), inputs)


def test_scores_in_the_logits_dtype_die_where_the_model_says_float32() -> None:
    """Handed on in bfloat16 a weight may be rounded once; a softmax in bfloat16, its sum and its quotient are more."""
    inputs = built(SOFTMAX, BF16)
    ids, weights = routed(inputs)
    judge_routing("route", Routing(ids, weights.bfloat16()), inputs)
    judge_routing("route", Routing(ids, weights.bfloat16().float()), inputs)
    for narrow in (narrow_softmax(inputs), narrow_softmax(inputs).float()):
        with pytest.raises(Nonconformance, match="wrong weights"):
            judge_routing("route", Routing(ids, narrow), inputs)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", Routing(ids, weights * (1 + 2**-10)), inputs)  # more bits than bfloat16 has


def test_gemma4_keeps_its_weights_in_float32() -> None:
    inputs = built(GEMMA4, BF16)
    ids, weights = routed(inputs)
    judge_routing("route", Routing(ids, weights.float()), inputs)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", Routing(ids, weights.bfloat16()), inputs)


def test_weights_may_be_handed_on_in_the_dtype_that_is_said() -> None:
    inputs = built(SOFTMAX, FP32)
    ids, weights = routed(inputs)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", Routing(ids, weights.bfloat16()), inputs)
    judge_routing("route", Routing(ids, weights.bfloat16()), inputs, stored=BF16)


def tied(*values: float, spec: RoutingSpec = BEST_TWO) -> RouteInputs:
    return RouteInputs(torch.tensor([values]), spec)


def takes(inputs: RouteInputs, ids: list[int], weights: list[float]) -> bool:
    try:
        judge_routing("route", Routing(torch.tensor([ids]), torch.tensor([weights])), inputs)
    except Nonconformance:
        return False
    return True


def test_a_tie_may_be_broken_either_way() -> None:
    inputs = tied(1.0, 0.0, 1.0, 1.0)
    third = torch.tensor([1.0, 0.0, 1.0, 1.0]).softmax(0)[0].item()
    assert takes(inputs, [0, 2], [third, third])
    assert takes(inputs, [3, 2], [third, third])
    assert not takes(inputs, [3, 1], [third, third])


def test_a_score_that_underflows_may_be_0() -> None:
    """exp overflows in float32 where the sigmoid is a number yet, if below the normal ones."""
    inputs = tied(-100.0, -50.0, spec=RoutingSpec(2, score="sigmoid"))
    half = torch.tensor(-50.0).sigmoid().item()
    assert takes(inputs, [0, 1], [0.0, half])
    assert not takes(inputs, [0, 1], [0.0, 0.0])
    assert not takes(inputs, [0, 1], [1e-37, half])


ROOTS = RoutingSpec(3, score="sqrt_softplus", score_dtype="input", renormalize="sum", scale=1.5)
# Logits whose exp leaves the normal numbers of float32, and of float16, one after the other.
BELOW = torch.linspace(-110, -2, 433)
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": lambda v: torch.nn.functional.softplus(v).sqrt(),
    "log1p": lambda v: v.exp().log1p().sqrt(),
    "exp flushed": lambda v: v.exp().where(v.exp() >= torch.finfo(FP32).tiny, 0).log1p().sqrt(),
    "log1p in float32, stored once": lambda v: v.float().exp().log1p().sqrt().to(v.dtype),
}


def roots(dtype: torch.dtype) -> RouteInputs:
    """Each of BELOW as the last chosen of a row, beside two that are numbers in every precision."""
    others = torch.tensor([[0.5, -1.0, -torch.finfo(dtype).max]]).expand(len(BELOW), 3)
    return RouteInputs(torch.cat([others, BELOW[:, None]], 1).to(dtype), ROOTS)


def weighed(inputs: RouteInputs, score: Callable[[Tensor], Tensor]) -> Routing:
    ids = torch.tensor([[0, 1, 3]]).expand(len(inputs.logits), 3)
    found = score(inputs.logits).gather(1, ids)
    return Routing(ids, found / found.sum(1, keepdim=True) * ROOTS.scale)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("way", WAYS)
def test_a_softplus_below_the_normal_numbers_has_a_root_of_some_size(way: str, dtype: torch.dtype) -> None:
    inputs = roots(dtype)
    judge_routing("route", weighed(inputs, WAYS[way]), inputs)
    judge_routing("route", routed(inputs), inputs)


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        (lambda v: (1 + v.exp()).log().sqrt(), -16),  # 1 + exp is 1, or has few bits of exp
        (lambda v: v.exp().log1p(), -80),
        (lambda v: (v / 2).exp(), -10),  # its square is softplus up to exp / 2 of it
        (lambda v: v.exp().log1p().sqrt() * (1 + 2**-18), -85),
        (lambda v: v.exp().where(v > -80, 0).log1p().sqrt(), -85),
    ],
)
def test_a_wrong_root_shows_down_to_where_exp_leaves_the_normal_numbers(
    wrong: Callable[[Tensor], Tensor], first: int
) -> None:
    """One row at a time, for another may show it first."""
    inputs = roots(FP32)
    near = (BELOW - first).abs().argmin()
    alone = replace(inputs, logits=inputs.logits[near : near + 1])
    right = WAYS["log1p"]

    def last(v: Tensor) -> Tensor:
        return torch.cat([right(v[:, :3]), wrong(v[:, 3:])], 1)

    judge_routing("route", weighed(alone, right), alone)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", weighed(alone, last), alone)


def test_a_tie_of_groups_may_be_broken_either_way() -> None:
    spec = RoutingSpec(2, select_on="logits", groups=3, top_groups=1, score="sigmoid")
    inputs = tied(1.0, 0.5, 0.75, 1.0, -2.0, -1.0, spec=spec)
    score = torch.tensor([1.0, 0.5, 0.75]).sigmoid().tolist()
    assert takes(inputs, [0, 1], score[:2])
    assert takes(inputs, [3, 2], [score[0], score[2]])
    assert not takes(inputs, [0, 3], [score[0], score[0]])
    assert not takes(inputs, [4, 5], torch.tensor([-2.0, -1.0]).sigmoid().tolist())


def test_near_ties_of_the_sparse_mixer_may_be_chosen_in_either_order() -> None:
    inputs = tied(2.0, 2.0, 1.9, -9.0, spec=replace(MIXER, jitter=0.1))
    first = 1 / (2 + torch.tensor(-0.1).exp().item())
    second = 1 / (1 + torch.tensor(-0.1).exp().item())
    assert takes(inputs, [0, 1], [first, second])
    assert takes(inputs, [0, 1], [second, first])
    assert not takes(inputs, [0, 1], [first, first])
    apart = tied(2.25, 2.0, 1.9, -9.0, spec=replace(MIXER, jitter=0.1))
    ids, weights = routed(apart)
    assert takes(apart, ids[0].tolist(), weights[0].tolist())
    assert not takes(apart, ids[0].tolist(), weights[0].flip(0).tolist())


def mixed(logits: list[float], order: list[int], jitter: float) -> list[float]:
    """Weights of experts chosen in this order, as the sparse mixer says, by slot."""
    left, found = dict(enumerate(logits)), []
    for chosen in order:
        best = left[chosen]
        near = [v for v in left.values() if (best - v) / max(abs(v), best) <= 2 * jitter]
        found.append(math.exp(best) / sum(map(math.exp, near)))
        del left[chosen]
    return found


def test_eight_experts_of_the_sparse_mixer_are_judged_in_a_moment() -> None:
    """Three near ties, of two and of three experts; all other orders are certain."""
    spec = replace(MIXER, top_k=8, jitter=0.1)
    logits = [4.0, 4.0, 3.75, 3.5, 3.5, 3.5, 3.25, 3.0, 2.9, -9.0]
    inputs = RouteInputs(torch.tensor([logits]).expand(9, 10), spec)
    began = time.perf_counter()
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 2, 5, 3, 4, 6, 7]):
        weights = torch.tensor([mixed(logits, order, 0.1)]).expand(9, 8)
        judge_routing("route", Routing(torch.tensor([order]).expand(9, 8), weights), inputs)
    assert time.perf_counter() - began < 1
    for order in ([0, 2, 1, 3, 4, 5, 6, 7], [0, 1, 3, 2, 4, 5, 6, 7], [7, 0, 1, 2, 3, 4, 5, 6]):
        assert not takes(tied(*logits, spec=spec), order, mixed(logits, order, 0.1))
    right = mixed(logits, [*range(8)], 0.1)
    assert not takes(tied(*logits, spec=spec), [*range(8)], [right[1], right[0], *right[2:5], right[2], *right[6:]])


def test_orders_of_rows_are_their_own() -> None:
    """Of three rows with one, two and two orders each is judged by its own."""
    spec = replace(MIXER, top_k=3, jitter=0.1)
    rows = [[2.25, 2.0, 1.75, -9.0], [2.0, 2.0, 1.75, -9.0], [2.25, 2.0, 2.0, -9.0]]
    orders = [[0, 1, 2], [1, 0, 2], [0, 2, 1]]
    weights = torch.tensor([mixed(row, order, 0.1) for row, order in zip(rows, orders, strict=True)])
    inputs = RouteInputs(torch.tensor(rows), spec)
    judge_routing("route", Routing(torch.tensor(orders), weights), inputs)
    for row in range(3):
        wrong = weights.clone()
        wrong[row] = wrong[row].flip(0)
        with pytest.raises(Nonconformance, match=rf"1 rows have wrong weights, first \[{row}, 0\]"):
            judge_routing("route", Routing(torch.tensor(orders), wrong), inputs)


def test_weights_of_more_near_ties_than_are_tried_are_not_judged_and_ids_are() -> None:
    spec = replace(MIXER, top_k=5, jitter=0.1)
    four, five = [2.0] * 4 + [1.75, 1.5, -9.0], [2.0] * 5 + [1.75, -9.0]
    any_weights = [0.3, 0.1, 0.5, 0.2, 0.4]
    assert takes(tied(*five, spec=spec), [4, 2, 0, 1, 3], any_weights)
    assert not takes(tied(*five, spec=spec), [4, 2, 0, 1, 5], any_weights)
    assert not takes(tied(*five, spec=spec), [4, 2, 0, 1, 1], any_weights)
    order = [2, 0, 3, 1, 4]
    assert takes(tied(*four, spec=spec), order, mixed(four, order, 0.1))
    assert not takes(tied(*four, spec=spec), order, any_weights)
    both = RouteInputs(torch.tensor([five, four]), spec)
    with pytest.raises(Nonconformance, match=r"1 rows have wrong weights, first \[1, 0\]"):
        judge_routing("route", Routing(torch.tensor([[0, 1, 2, 3, 4]] * 2), torch.tensor([any_weights] * 2)), both)


def test_a_logit_near_the_threshold_within_its_error_is_in_or_out() -> None:
    """The distance of the logits 1 and 0.75 over the larger is 0.25, of either of which 0.01 is an error."""
    spec = RoutingSpec(1, selector="sparsemixer", jitter=0.125 * 0.99, select_on="logits")
    inputs = tied(1.0, 0.75, -9.0, spec=spec)
    exact = Value.of(inputs.logits)
    inside = 1 / (1 + torch.tensor(-0.25).exp().item())
    for errors, both in ((exact.exact * 0, False), (torch.tensor([[0.0, 0.01, 0.0]]), True)):
        logits = Value(exact.exact, errors / 5)
        judge_routing("router", Routing(torch.tensor([[0]]), torch.tensor([[1.0]])), inputs, logits)
        near = Routing(torch.tensor([[0]]), torch.tensor([[inside]]))
        if both:
            judge_routing("router", near, inputs, logits)
        else:
            with pytest.raises(Nonconformance, match="wrong weights"):
                judge_routing("router", near, inputs, logits)


@pytest.mark.parametrize("dropped", [False, True])
def test_what_is_added_to_a_tiny_sum_must_be_there(dropped: bool) -> None:
    spec = RoutingSpec(3, score="sigmoid", renormalize="sum", epsilon=1e-6)
    logits = torch.tensor([[-14.0, -15.0, -14.5, -16.0, -40.0]])
    ids, weights, _ = route_logits(logits, replace(spec, epsilon=0.0) if dropped else spec, {})
    assert takes(RouteInputs(logits, spec), ids[0].tolist(), weights[0].tolist()) is not dropped


def test_rows_that_are_no_numbers_have_any_different_experts() -> None:
    inputs = built(V3)
    inputs.logits[3, 7], inputs.logits[4], inputs.logits[5, 0] = torch.nan, -torch.inf, torch.inf
    ids, weights = (part.clone() for part in routed(inputs))
    weights[3:6] = torch.nan
    ids[3:6] = torch.tensor([[1, 9, 0, 23]])
    judge_routing("route", Routing(ids, weights), inputs)
    with pytest.raises(Nonconformance, match="row 4: got ids"):
        judge_routing("route", Routing(ids.index_fill(0, torch.tensor([4]), 3), weights), inputs)
    ids[3, 1] = E
    with pytest.raises(Nonconformance, match=r"ids\[3, 1\]: got 24"):
        judge_routing("route", Routing(ids, weights), inputs)


def test_capped_infinities_are_no_numbers_either() -> None:
    inputs = built(replace(V3, logit_softcap=2.0, groups=1, top_groups=1))
    inputs.logits[3, 7] = torch.inf
    ids, weights = (part.clone() for part in routed(inputs))
    ids[3], weights[3] = torch.tensor([0, 1, 2, 3]), 0.0
    judge_routing("route", Routing(ids, weights), inputs)


def test_rows_behind_the_valid_ones_are_not_looked_at() -> None:
    inputs = replace(built(NLLB), valid_rows=15)
    ids, weights, _ = route_logits(inputs.logits[:15], NLLB, {})
    rest = torch.full((T - 15, 2), -7)
    answer = Routing(torch.cat([ids, rest]), torch.cat([weights, rest * torch.nan]))
    judge_routing("route", answer, inputs)
    with pytest.raises(Nonconformance, match="got -7"):
        judge_routing("route", answer, replace(inputs, valid_rows=16, routing=replace(NLLB, capacity=None)))


def test_of_more_experts_than_the_kept_groups_have_all_of_those_are_chosen() -> None:
    inputs = built(replace(V3, top_k=10))
    ids, weights = routed(inputs)
    kept = ids[:, :8]
    for others in (ids[:, 8:], torch.stack([_others(row) for row in kept])):
        judge_routing("route", Routing(torch.cat([kept, others], 1), weights * 0), inputs)
    with pytest.raises(Nonconformance, match="wrong experts"):
        missing = torch.stack([torch.cat([row[:7], _others(row), _others(row)[:1] * 0 + row[7]])[:9] for row in kept])
        swapped = torch.cat([missing, torch.stack([_third(row) for row in missing])], 1)
        judge_routing("route", Routing(swapped, weights), inputs)


@pytest.mark.parametrize("mask", [-torch.inf, 0.0])
def test_of_those_the_weights_of_the_kept_groups_are_judged_unless_a_sum_divides_them(mask: float) -> None:
    """DeepSeek-V2 in transformers gives experts of other groups the mask as a weight, others give their scores."""
    inputs = built(replace(V2, top_k=10, group_mask=mask, selection_bias=False))
    ids, weights = routed(inputs)
    masked = torch.cat([weights[:, :8], torch.full((T, 2), mask)], 1)
    for right in (weights, masked):
        judge_routing("route", Routing(ids, right), inputs)
    summed = replace(inputs, routing=replace(inputs.routing, renormalize="sum"))
    judge_routing("route", Routing(ids, masked.clamp(min=0) / 2), summed)
    wrong = weights.clone()
    wrong[4, 7] *= 1.01
    with pytest.raises(Nonconformance, match=r"1 rows have wrong weights, first \[4, 7\]"):
        judge_routing("route", Routing(ids, wrong), inputs)


@pytest.mark.parametrize("mask", [-torch.inf, 0.0])
def test_of_two_groups_that_tie_either_is_the_kept_one(mask: float) -> None:
    """Both have the same logits, which are compared without an error; the third has none that is as good."""
    spec = RoutingSpec(10, score="sigmoid", select_on="logits", groups=3, top_groups=1, group_mask=mask)
    logits = torch.linspace(1, 2, 8).repeat(3)
    logits[16:] = -20.0
    for kept, other in ((slice(0, 8), slice(8, 10)), (slice(8, 16), slice(0, 2))):
        ids = torch.cat([torch.arange(24)[kept], torch.arange(24)[other]])
        weights = torch.cat([logits[kept].sigmoid(), torch.full((2,), mask)])
        assert takes(tied(*logits.tolist(), spec=spec), ids.tolist(), weights.tolist())


def test_as_many_experts_as_the_kept_groups_have_are_all_judged() -> None:
    inputs = built(replace(V3, top_k=8))
    ids, weights = routed(inputs)
    judge_routing("route", Routing(ids, weights), inputs)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", Routing(ids, weights * 1.01), inputs)


def _others(row: Tensor) -> Tensor:
    """Two experts that are not in the row."""
    return torch.tensor([expert for expert in range(E - 1, -1, -1) if expert not in row.tolist()][:2])


def _third(row: Tensor) -> Tensor:
    return _others(row)[:1]


def test_a_pair_without_expert_is_said_by_its_id_or_by_its_weight() -> None:
    for spec in (NLLB, BEFORE, SWITCH, ZAYA):
        inputs = built(spec)
        ids, weights = routed(inputs)
        none = weights == 0
        assert none.any()
        judge_routing("route", Routing(ids.masked_fill(none, -1), weights), inputs)
        judge_routing("route", Routing(ids.masked_fill(none, -1), weights.masked_fill(none, 0.5)), inputs)
        judge_routing("route", Routing(ids.masked_fill(none, E + 3), weights), inputs)
        with pytest.raises(Nonconformance):
            judge_routing("route", Routing(ids.masked_fill(none.flip(0), -1), weights), inputs)


def test_a_pair_without_expert_is_no_repeat_of_another() -> None:
    """Of two tokens with the same first choice and one place the second has its second choice alone."""
    spec = RoutingSpec(2, capacity=Capacity(tokens=1, per="batch"))
    for second in (1, 2):
        logits = torch.tensor([[5.0, 0.0, 1.0], [5.0, 1.0, 0.0]])[:, [0, second, 3 - second]]
        weights = logits.softmax(-1).topk(2).values
        ids = torch.tensor([[0, 3 - second], [-1, second]])
        for order in ([0, 1], [1, 0]):
            judge_routing("route", Routing(ids[:, order], weights[:, order]), RouteInputs(logits, spec))
        with pytest.raises(Nonconformance, match="wrong experts"):
            judge_routing("route", Routing(ids.clamp(min=0), weights), RouteInputs(logits, spec))


def test_the_engine_s_own_logits_have_errors() -> None:
    """Ids that the exact logits do not give, but logits within their errors do; and no others."""
    inputs = tied(1.0, 0.9, 0.0)
    exact = Value.of(inputs.logits)
    near, far = (Value(exact.exact, torch.full_like(exact.exact, error)) for error in (0.02, 0.001))
    one = replace(inputs, routing=RoutingSpec(1, select_on="logits"))
    swapped = Routing(torch.tensor([[1]]), torch.tensor([[1.0]]))
    judge_routing("router", swapped, one, near)
    for logits in (far, None):
        with pytest.raises(Nonconformance, match="wrong experts"):
            judge_routing("router", swapped, one, logits)


def test_a_shift_of_all_logits_costs_a_rounding_of_its_size() -> None:
    inputs = built(SOFTMAX)
    ids, weights = routed(inputs)
    off = Routing(ids, weights * (1 + 900 * 2**-24))
    judge_routing("route", off, inputs, shift=1024.0)
    judge_routing("route", off, inputs, shift=-1024.0)
    with pytest.raises(Nonconformance, match="wrong weights"):
        judge_routing("route", off, inputs)


FUSED = {
    "constant": (V3, FusedShared(2, "constant", 0.4), lambda i, w: torch.full((T, 2), 0.4)),
    "share": (V2, FusedShared(2, "share", 0.25), lambda i, w: (w.sum(-1, keepdim=True) * 0.25).expand(T, 2)),
    "router": (INKLING, FusedShared(2, "router"), lambda i, w: route_logits(i.logits, INKLING, i.tensors).shared),
}


@pytest.mark.parametrize("rule", FUSED)
def test_fused_shared_experts_stand_behind_the_routed_ones(rule: str) -> None:
    spec, fused, weigh = FUSED[rule]
    inputs = replace(built(spec), fused_shared=fused)
    ids, weights = routed(inputs)
    own = weigh(inputs, weights)
    last = torch.tensor([[E, E + 1]]).expand(T, 2)

    def answer(last: Tensor, own: Tensor) -> Routing:
        return Routing(torch.cat([ids, last], 1), torch.cat([weights, own], 1))

    for right in (answer(last, own), answer(last.flip(1), own.flip(1))):
        judge_routing("route", right, inputs)
        judge_fused_shared("route", right, inputs)
    twice = last.clone()
    twice[4] = E
    for bad, words in (
        (answer(twice, own), rf"row 4: ids of shared experts: got \[{E}, {E}\]"),
        (answer(last - 1, own), "row 0: ids of shared experts"),
        (answer(last, own * 1.01), rf"weights\[0, {spec.top_k}\], of shared expert 0 by rule '{rule}'"),
    ):
        with pytest.raises(Nonconformance, match=words):
            judge_fused_shared("route", bad, inputs)
        with pytest.raises(Nonconformance, match=words):
            judge_routing("route", bad, inputs)


def test_a_constant_weight_may_be_rounded_to_float32_or_not() -> None:
    """0.4 is no number of float32, which has 0.4 + 6e-9, and as the next one 0.4 + 36e-9."""
    spec, fused, _ = FUSED["constant"]
    inputs = replace(built(spec), fused_shared=fused)
    ids, weights = routed(inputs)
    last = torch.tensor([[E, E + 1]]).expand(T, 2)
    single = torch.tensor(0.4)

    def answer(constant: Tensor) -> Routing:
        own = constant.double().expand(T, 2)
        return Routing(torch.cat([ids, last], 1), torch.cat([weights.double(), own], 1))

    judge_routing("route", answer(torch.tensor(0.4, dtype=torch.float64)), inputs)
    judge_routing("route", answer(single), inputs)
    with pytest.raises(Nonconformance, match="by rule 'constant'"):
        judge_routing("route", answer(single.nextafter(torch.tensor(1.0))), inputs)


@pytest.mark.parametrize("spec", [GEMMA4, V2], ids=["scale-of-its-own", "plain"])
def test_a_share_of_weights_in_float32_has_no_error_of_another_dtype(spec: RoutingSpec) -> None:
    """2 K roundings of the sum, one of the share and one of the product: 10 u of the sum of magnitudes."""
    inputs = replace(built(spec, BF16 if spec.per_expert_scale else FP32), fused_shared=FusedShared(1, "share", 0.25))
    ids, weights = routed(inputs)
    last, total = torch.full((T, 1), E), weights.double().sum(-1, keepdim=True) * 0.25

    def answer(units: float) -> Routing:
        return Routing(torch.cat([ids, last], 1), torch.cat([weights.double(), total * (1 + units * 2**-24)], 1))

    judge_fused_shared("route", answer(9.5), inputs)
    with pytest.raises(Nonconformance, match="by rule 'share'"):
        judge_fused_shared("route", answer(10.5), inputs)


def test_a_share_of_rounded_weights_is_one() -> None:
    spec, fused, _ = FUSED["share"]
    inputs = replace(built(spec, BF16), fused_shared=fused)
    ids, weights = routed(inputs)
    last = torch.tensor([[E, E + 1]]).expand(T, 2)

    def answer(weights: Tensor, total: Tensor) -> Routing:
        share = (total.sum(-1, keepdim=True) * 0.25).expand(T, 2)
        return Routing(torch.cat([ids, last], 1), torch.cat([weights, share], 1))

    rounded = weights.bfloat16().float()
    judge_routing("route", answer(rounded, rounded), inputs)
    judge_routing("route", answer(weights, weights), inputs)
    with pytest.raises(Nonconformance, match="by rule 'share'"):
        judge_routing("route", answer(rounded, rounded * (1 + 2**-6)), inputs)
    exact = replace(built(spec), fused_shared=fused)
    ids, weights = routed(exact)
    judge_routing("route", answer(weights, weights.double() * (1 + 5 * 2**-24)), exact)
    with pytest.raises(Nonconformance, match="by rule 'share'"):
        judge_routing("route", answer(weights.double(), weights.double() * (1 + 12 * 2**-24)), exact)
    with pytest.raises(Nonconformance, match="by rule 'share'"):
        judge_routing("route", answer(weights, weights.bfloat16().float()), exact)


def test_the_router_s_weights_of_shared_experts_belong_to_their_ids() -> None:
    spec, fused, weigh = FUSED["router"]
    inputs = replace(built(spec), fused_shared=fused)
    ids, weights = routed(inputs)
    last = torch.tensor([[E + 1, E]]).expand(T, 2)
    with pytest.raises(Nonconformance, match="of shared expert 1"):
        own = weigh(inputs, weights)
        judge_routing("route", Routing(torch.cat([ids, last], 1), torch.cat([weights, own], 1)), inputs)


def test_no_tokens_are_judged_by_their_form() -> None:
    for spec in SPECS.values():
        inputs = built(spec, tokens=0)
        empty = torch.zeros(0, spec.top_k)
        judge_routing("route", Routing(empty.long(), empty), inputs)
        with pytest.raises(Nonconformance, match="ids: got shape"):
            judge_routing("route", Routing(empty[:, 1:].long(), empty), inputs)
