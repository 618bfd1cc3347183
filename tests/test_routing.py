"""Every rule of routing on numbers small enough to check by hand, and what must hold for any numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import FusedShared, RouteInputs, RouterSpec, Routing
from moe_conformance.errors import InputError
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.model.specs import Capacity, LogitsSpec, RoutingSpec
from moe_conformance.reference_impl.router import Router, build_router, router_logits
from moe_conformance.reference_impl.routing import route, route_logits, top_experts

NAN, INF, LN2, LN3, LN4, LN5 = math.nan, math.inf, math.log(2), math.log(3), math.log(4), math.log(5)
BIAS, SCALE, GLOBAL, TABLE = (
    f"router.{name}" for name in ("selection_bias", "per_expert_scale", "global_scale", "table")
)
Spec = TypeVar("Spec")


def fresh(spec: Spec) -> Spec:
    """The spec as read from a file: its words are equal to those in the code, and not the same objects."""
    words = {each.name: getattr(spec, each.name) for each in fields(spec)}  # type: ignore[arg-type]
    return replace(spec, **{name: "".join(list(word)) for name, word in words.items() if isinstance(word, str)})  # type: ignore[type-var]


def logs(*values: float) -> list[float]:
    """Logits whose softmax is in proportion to values."""
    return [math.log(value) for value in values]


@dataclass(frozen=True)
class Example:
    """Logits, and for each row the experts, best first, and their weights."""

    name: str
    logits: Sequence[Sequence[float]]
    spec: RoutingSpec
    ids: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]]
    tensors: Mapping[str, Any] = field(default_factory=dict)
    shared: Sequence[Sequence[float]] | None = None
    token_ids: Sequence[int] | None = None
    sequences: int = 1


# Softmax .05 .25 .1 .4 .2, and .1 .3 .2 .4
FIVE, FOUR = [logs(1, 5, 2, 8, 4)], [logs(1, 3, 2, 4)]
# Sigmoid .5 .8 .2 .75 .25
ODDS = [[0.0, LN4, -LN4, LN3, -LN3]]
# Softmax in 25ths. In pairs: the best are 6, 5, 7; the sums 7, 9, 9.
PAIRS = [logs(6, 1, 4, 5, 7, 2)]
# Sigmoid 1/3, 1/4, 1/5, 1/6
BELOW = [[-LN2, -LN3, -LN4, -LN5]]
# Softmax in tenths. First choices 0 0 0 1, second 1 2 1 0; best first by score: tokens 2, 1, then 0 and 3 alike.
CROWD = [logs(5, 4, 1), logs(6, 1, 3), logs(7, 2, 1), logs(3, 5, 2)]
CROWD_IDS = [[0, 1], [0, 2], [0, 1], [1, 0]]
ALIKE = [logs(1, 3)]

SIGMOID = RoutingSpec(2, score="sigmoid")
CHOSEN = RoutingSpec(2, select_on="logits")
GROUPS = RoutingSpec(3, groups=3, top_groups=2)
MASKED = RoutingSpec(3, score="sigmoid", select_on="logits", groups=2)
KEYS = RoutingSpec(2, selector="product_keys", select_on="logits")
SHARED = RoutingSpec(2, score="sigmoid", shared_classes=2)
SUM = RoutingSpec(2, renormalize="sum")
TOP1 = RoutingSpec(1)


def mixer(jitter: float) -> RoutingSpec:
    return RoutingSpec(2, selector="sparsemixer", select_on="logits", jitter=jitter)


def queued(**capacity: Any) -> RoutingSpec:
    return replace(SUM, capacity=Capacity(**capacity))


EXAMPLES = (
    # scores
    Example("softmax", FIVE, RoutingSpec(2), [[3, 1]], [[0.4, 0.25]]),
    Example("every-expert", FIVE, RoutingSpec(5), [[3, 1, 4, 2, 0]], [[0.4, 0.25, 0.2, 0.1, 0.05]]),
    Example("one-expert-of-one", [[-3.0]], TOP1, [[0]], [[1.0]]),
    Example("two-rows", [*FOUR, [0.0] * 4], TOP1, [[3], [0]], [[0.4], [0.25]]),
    Example("sigmoid", ODDS, SIGMOID, [[1, 3]], [[0.8, 0.75]]),
    # softplus(log(e^n - 1)) = n
    Example(
        "sqrt-softplus",
        [[math.log(math.e - 1), math.log(math.e**4 - 1), -9.0]],
        RoutingSpec(2, score="sqrt_softplus"),
        [[1, 0]],
        [[2.0, 1.0]],
    ),
    Example("softmax-of-the-chosen", FIVE, CHOSEN, [[3, 1]], [[8 / 13, 5 / 13]]),
    Example("sigmoid-of-the-chosen", ODDS, replace(CHOSEN, score="sigmoid"), [[1, 3]], [[0.8, 0.75]]),
    Example("ties", [[-1.0, 0.0, 0.0, 0.0, -1.0]], replace(SIGMOID, top_k=3), [[1, 2, 3]], [[0.5, 0.5, 0.5]]),
    # logits
    Example("logit-scale", [[LN3 / 2, LN2]], replace(SIGMOID, logit_scale=2), [[1, 0]], [[0.8, 0.75]]),
    Example(
        "logit-softcap",
        [[4 * math.atanh(LN3 / 4), 4 * math.atanh(LN4 / 4)]],
        replace(SIGMOID, logit_softcap=4),
        [[1, 0]],
        [[0.8, 0.75]],
    ),
    Example(
        "logit-scale-then-softcap",
        [[math.atanh(LN3 / 2), math.atanh(LN4 / 2)]],
        replace(SIGMOID, logit_scale=2, logit_softcap=2),
        [[1, 0]],
        [[0.8, 0.75]],
    ),
    # selection bias: scores .5 .8 .9 .75 .75; logits 0, 1.4, 1.6, ...
    Example(
        "bias-on-scores",
        ODDS,
        replace(SIGMOID, selection_bias=True),
        [[2, 1]],
        [[0.2, 0.8]],
        {BIAS: [0, 0, 0.7, 0, 0.5]},
    ),
    Example(
        "bias-on-logits",
        ODDS,
        replace(SIGMOID, select_on="logits", selection_bias=True),
        [[2, 1]],
        [[0.2, 0.8]],
        {BIAS: [0, 0, 3, 0, 0]},
    ),
    # groups
    Example("groups-by-best", PAIRS, GROUPS, [[4, 0, 5]], [[0.28, 0.24, 0.08]]),
    Example("groups-by-two-best", PAIRS, replace(GROUPS, group_score="top2_sum"), [[4, 3, 2]], [[0.28, 0.2, 0.16]]),
    Example("groups-of-one", FIVE, RoutingSpec(2, groups=5, top_groups=2), [[3, 1]], [[0.4, 0.25]]),
    # 6 11 4 | 5 7 2, in threes: the two best are 17 and 12, the best three 21 and 14, the best 11 and 7
    Example(
        "groups-of-biased-scores",
        PAIRS,
        RoutingSpec(2, groups=2, selection_bias=True),
        [[1, 0]],
        [[0.04, 0.24]],
        {BIAS: [0, 0.4, 0, 0, 0, 0]},
    ),
    # 9 0 0 | 5 5 5 | 6 6 0 and the rest: the sum of the two best is 9, 10, 12
    Example(
        "two-best-of-three",
        [logs(90, 1, 1, 55, 55, 55, 60, 61, 1)],
        RoutingSpec(2, groups=3, group_score="top2_sum"),
        [[7, 6]],
        [[61 / 379, 60 / 379]],
    ),
    Example("masked-by-minus-infinity", BELOW, MASKED, [[0, 1, 2]], [[1 / 3, 1 / 4, 1 / 5]]),
    Example("masked-by-zero", BELOW, replace(MASKED, group_mask=0.0), [[2, 3, 0]], [[1 / 5, 1 / 6, 1 / 3]]),
    # selectors. The halves, as products: 1 6 2 by 3 1 5 is 3 1 5 18 6 30 6 2 10.
    Example("product-keys", [logs(1, 6, 2, 3, 1, 5)], KEYS, [[5, 3]], [[30 / 48, 18 / 48]]),
    # 1 6 2 by 1 2 4 is 1 2 4 6 12 24 2 4 8, and 3 1 5 by 7 1 3 is 21 3 9 7 1 3 35 5 15.
    Example(
        "product-keys-cross-tokens",
        [logs(1, 6, 2, 3, 1, 5), logs(1, 2, 4, 7, 1, 3)],
        KEYS,
        [[5, 4], [6, 0]],
        [[24 / 36, 12 / 36], [35 / 56, 21 / 56]],
    ),
    # 12 is as far from 16 as it may be, 4 / 16; both 12 and 11 are near 14.
    Example(
        "sparsemixer",
        [[14.0, 11.0, 16.0, -40.0, 12.0]],
        mixer(0.125),
        [[2, 0]],
        [[1 / (1 + math.exp(-2) + math.exp(-4)), 1 / (1 + math.exp(-2) + math.exp(-3))]],
    ),
    # Below 0 distances are parts of the smaller logit: 1/5 is near, 2/6 is not.
    Example("sparsemixer-below-zero", [[-6.0, -5.0, -4.0]], mixer(0.11), [[2, 1]], [[1 / (1 + math.exp(-1))] * 2]),
    # Probabilities of both others are 0 in float32.
    Example("sparsemixer-far-apart", [[-300.0, 0.0, 300.0]], mixer(0.125), [[2, 1]], [[1.0, 1.0]]),
    # 9 / 10 and not 9 / 1
    Example("sparsemixer-of-the-larger", [[10.0, 1.0]], mixer(0.46), [[0, 1]], [[1 / (1 + math.exp(-9)), 1.0]]),
    Example(
        "table",
        FIVE + ODDS,
        RoutingSpec(2, selector="table", score="sigmoid", renormalize="sum"),
        [[4, 0], [2, 1]],
        [[(4 / 5) / (4 / 5 + 1 / 2), (1 / 2) / (4 / 5 + 1 / 2)], [0.2, 0.8]],
        {TABLE: [[2, 1], [0, 3], [4, 0]]},
        token_ids=[2, 0],
    ),
    # normalisation
    Example("sum", FIVE, SUM, [[3, 1]], [[8 / 13, 5 / 13]]),
    Example("sum-and-epsilon", FIVE, replace(SUM, epsilon=0.15), [[3, 1]], [[0.5, 0.3125]]),
    Example("sum-below-the-floor", FIVE, replace(SUM, epsilon=0.05, floor=0.8), [[3, 1]], [[0.5, 0.3125]]),
    Example("sum-above-the-floor", FIVE, replace(SUM, floor=0.6), [[3, 1]], [[8 / 13, 5 / 13]]),
    Example("norm-2", FOUR, replace(SUM, renormalize="norm", norm_order=2), [[3, 1]], [[0.8, 0.6]]),
    Example("norm-1", FOUR, replace(SUM, renormalize="norm"), [[3, 1]], [[4 / 7, 3 / 7]]),
    Example("norm-inf", FOUR, replace(SUM, renormalize="norm", norm_order=INF), [[3, 1]], [[1.0, 0.75]]),
    # scales
    Example("scale", FIVE, RoutingSpec(2, scale=2.5), [[3, 1]], [[1.0, 0.625]]),
    Example("scale-of-normalised", FIVE, replace(SUM, scale=2.6), [[3, 1]], [[1.6, 1.0]]),
    Example(
        "scale-of-each-expert",
        FOUR,
        replace(SUM, per_expert_scale=True),
        [[3, 1]],
        [[0.8, -0.3]],
        {SCALE: [2, -0.7, 3, 1.4]},
    ),
    Example(
        "global-scale",
        FIVE,
        RoutingSpec(2, scale=2, global_scale=True),
        [[3, 1]],
        [[0.24, 0.15]],
        {GLOBAL: [0.3]},
    ),
    # classes that are no experts
    Example("identity-experts", FIVE, RoutingSpec(2, identity_experts=2), [[3, 1]], [[0.4, 0.25]]),
    Example(
        "skipped",
        FIVE,
        RoutingSpec(2, skip_expert=True, selection_bias=True),
        [[-1, 3]],
        [[0.0, 0.4]],
        {BIAS: [0, 0, 0, 0, 0.3]},
    ),
    Example("not-skipped", FIVE, RoutingSpec(2, skip_expert=True), [[3, 1]], [[0.4, 0.25]]),
    # .8 + .5 and the shared .75 + .25
    Example("shared", ODDS, SHARED, [[1, 0]], [[8 / 23, 5 / 23]], shared=[[7.5 / 23, 2.5 / 23]]),
    # .2 + .8 and the shared 1
    Example(
        "shared-biased-and-scaled",
        ODDS,
        replace(SHARED, selection_bias=True, scale=2.5, global_scale=True),
        [[2, 1]],
        [[0.5, 2.0]],
        {BIAS: [0, 0, 0.7], GLOBAL: [2]},
        shared=[[1.875, 0.625]],
    ),
    Example("shared-far-below-zero", [[-1e4] * 5], SHARED, [[0, 1]], [[0.25] * 2], shared=[[0.25] * 2]),
    # capacity. Expert 0 is full after tokens 0 and 1; expert 1 after token 3's first and token 0's second choice.
    Example(
        "first-come",
        CROWD,
        queued(tokens=2, per="batch"),
        CROWD_IDS,
        [[5 / 9, 4 / 9], [6 / 9, 3 / 9], [0, 0], [1, 0]],
    ),
    Example(
        "normalised-before",
        CROWD,
        queued(tokens=2, per="batch", renormalize_before=True),
        CROWD_IDS,
        [[5 / 9, 4 / 9], [6 / 9, 3 / 9], [0, 0], [5 / 8, 0]],
    ),
    # Expert 0 is full after tokens 2 and 1; expert 1 after token 3's first and token 2's second choice.
    Example(
        "best-first",
        CROWD,
        queued(tokens=2, per="batch", by_weight=True),
        CROWD_IDS,
        [[0, 0], [6 / 9, 3 / 9], [7 / 9, 2 / 9], [1, 0]],
    ),
    # Three first choices and token 3's second fill expert 0.
    Example(
        "room-for-all",
        CROWD,
        queued(tokens=4),
        CROWD_IDS,
        [[5 / 9, 4 / 9], [6 / 9, 3 / 9], [7 / 9, 2 / 9], [5 / 8, 3 / 8]],
    ),
    # Of the first two expert 0 takes token 1, and expert 1 token 0; of the last two both second choices come too late.
    Example(
        "best-first-in-each-sequence",
        CROWD,
        queued(tokens=1, by_weight=True),
        CROWD_IDS,
        [[0, 1], [6 / 9, 3 / 9], [1, 0], [1, 0]],
        sequences=2,
    ),
    Example(
        "a-sequence-of-its-own",
        ALIKE * 6,
        replace(TOP1, capacity=Capacity(2)),
        [[1]] * 6,
        [[0.75], [0.75], [0], [0.75], [0.75], [0]],
        sequences=2,
    ),
    Example(
        "one-batch",
        ALIKE * 6,
        replace(TOP1, capacity=Capacity(2, per="batch")),
        [[1]] * 6,
        [[0.75], [0.75], [0], [0], [0], [0]],
        sequences=2,
    ),
    # 2 ceil(9 / 4) = 6 of 9 tokens
    Example(
        "twice-the-even-share",
        FOUR * 9,
        replace(TOP1, capacity=Capacity()),
        [[3]] * 9,
        [[0.4]] * 6 + [[0.0]] * 3,
    ),
    # ceil(9 / 4) = 3 of 9 tokens, and not 5
    Example(
        "fraction",
        ALIKE * 9,
        replace(TOP1, capacity=Capacity(5, fraction=0.25)),
        [[1]] * 9,
        [[0.75]] * 3 + [[0.0]] * 6,
    ),
    Example(
        "no-fraction",
        ALIKE * 9,
        replace(TOP1, capacity=Capacity(5, fraction=-1.0)),
        [[1]] * 9,
        [[0.75]] * 5 + [[0.0]] * 4,
    ),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_worked_example(example: Example, dtype: torch.dtype) -> None:
    tensors = {
        name: torch.tensor(values, dtype=torch.int32 if name == TABLE else dtype)
        for name, values in example.tensors.items()
    }
    spec = fresh(example.spec)
    if spec.capacity is not None:
        spec = replace(spec, capacity=fresh(spec.capacity))
    token_ids = None if example.token_ids is None else torch.tensor(example.token_ids)
    logits = torch.tensor(example.logits, dtype=dtype)

    got = route_logits(logits=logits, spec=spec, tensors=tensors, token_ids=token_ids, sequences=example.sequences)

    assert got.ids.tolist() == example.ids
    assert got.ids.dtype == torch.int64
    close(got.weights, example.weights, dtype)
    if example.shared is None:
        assert got.shared is None
    else:
        close(got.shared, example.shared, dtype)


def close(got: Tensor | None, want: Sequence[Sequence[float]], dtype: torch.dtype) -> None:
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=tolerance, atol=0)


# Twelve classes, every rule at least once. Without capacity and product keys, where a row depends on others.
RULES = {
    "softmax": RoutingSpec(3),
    "softmax-of-the-chosen": RoutingSpec(3, select_on="logits", scale=2.5),
    "sigmoid-of-biased-logits": RoutingSpec(3, score="sigmoid", select_on="logits", selection_bias=True),
    "biased-softmax": RoutingSpec(3, selection_bias=True, renormalize="sum", floor=1e-12, scale=2.5),
    "biased-softplus": RoutingSpec(
        3, score="sqrt_softplus", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.5
    ),
    "groups-of-sigmoid": RoutingSpec(
        3, score="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="top2_sum", renormalize="sum"
    ),
    "groups-of-softmax": RoutingSpec(3, groups=4, top_groups=2, group_mask=0.0, renormalize="norm", norm_order=2),
    "sparsemixer": RoutingSpec(2, selector="sparsemixer", select_on="logits", jitter=0.1),
    "scaled-experts": RoutingSpec(3, renormalize="sum", per_expert_scale=True),
    "shared": RoutingSpec(3, score="sigmoid", selection_bias=True, shared_classes=2, global_scale=True, scale=2.5),
}
ROW_KINDS = {
    "a-nan": [NAN] + [1.0] * 11,
    "all-nan": [NAN] * 12,
    "all-minus-infinite": [-INF] * 12,
    "all-infinite": [INF] * 12,
    "one-left": [-INF] * 7 + [3.0] + [-INF] * 4,
    "alike": [2.0] * 12,
    "infinite-both-ways": [INF, -INF] * 6,
}
rules = pytest.mark.parametrize("spec", RULES.values(), ids=RULES)


def tensors_for(spec: RoutingSpec) -> dict[str, Tensor]:
    classes = 12 - spec.shared_classes
    return {
        BIAS: normal((classes,), "bias", torch.float64, 0.25),
        SCALE: normal((classes,), "scale", torch.float64) + 1.5,
        GLOBAL: torch.tensor([0.7], dtype=torch.float64),
    }


def logits_of(tokens: int) -> Tensor:
    return normal((tokens, 12), "logits", torch.float64, 2.0)


@rules
def test_ids_are_unique_and_in_range_for_any_row(spec: RoutingSpec) -> None:
    got = route_logits(torch.tensor(list(ROW_KINDS.values())), spec, tensors_for(spec))
    for row in got.ids.tolist():
        assert len(set(row)) == spec.top_k, row
        assert set(row) <= set(range(12 - spec.shared_classes)), row


@rules
def test_a_row_is_routed_by_itself(spec: RoutingSpec) -> None:
    rows = torch.cat([logits_of(4), torch.tensor(list(ROW_KINDS.values())), logits_of(3)])
    got = route_logits(rows, spec, tensors_for(spec))
    for number in range(len(rows)):
        alone = route_logits(rows[number : number + 1], spec, tensors_for(spec))
        torch.testing.assert_close(got.ids[number], alone.ids[0], rtol=0, atol=0)
        torch.testing.assert_close(got.weights[number], alone.weights[0], rtol=1e-14, atol=0, equal_nan=True)


@rules
def test_no_tokens_have_no_experts(spec: RoutingSpec) -> None:
    got = route_logits(logits_of(0), spec, tensors_for(spec))
    assert got.ids.shape == got.weights.shape == (0, spec.top_k)
    assert got.shared is None or got.shared.shape == (0, 2)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_no_tokens_of_any_number_of_sequences_have_no_experts(per: Any) -> None:
    for capacity in (Capacity(per=per), Capacity(3, per=per, by_weight=True)):
        got = route_logits(logits_of(0), RoutingSpec(2, capacity=capacity), {}, sequences=3)
        assert got.ids.shape == got.weights.shape == (0, 2)


@rules
def test_logits_are_left_as_they_were(spec: RoutingSpec) -> None:
    logits = logits_of(5)
    route_logits(logits, spec, tensors_for(spec))
    assert torch.equal(logits, logits_of(5))


@pytest.mark.parametrize("name", [name for name, spec in RULES.items() if spec.selection_bias])
def test_a_constant_on_every_bias_changes_nothing(name: str) -> None:
    spec = RULES[name]
    logits, tensors = logits_of(9), tensors_for(spec)
    got = route_logits(logits, spec, tensors)
    moved = route_logits(logits, spec, tensors | {BIAS: tensors[BIAS] + 3.0})
    assert torch.equal(got.ids, moved.ids)
    assert torch.equal(got.weights, moved.weights)


@pytest.mark.parametrize("name", [name for name in RULES if "softmax" in name or name == "scaled-experts"])
def test_a_constant_on_every_logit_of_a_softmax_changes_nothing(name: str) -> None:
    spec, logits = RULES[name], logits_of(9)
    got = route_logits(logits, spec, tensors_for(spec))
    moved = route_logits(logits + 64.0, spec, tensors_for(spec))
    assert torch.equal(got.ids, moved.ids)
    torch.testing.assert_close(got.weights, moved.weights, rtol=1e-13, atol=0)


@rules
def test_weights_are_in_proportion_to_the_scale(spec: RoutingSpec) -> None:
    got = route_logits(logits_of(9), spec, tensors_for(spec))
    twice = route_logits(logits_of(9), replace(spec, scale=2 * spec.scale), tensors_for(spec))
    assert torch.equal(twice.weights, 2 * got.weights)
    assert got.shared is None or (twice.shared is not None and torch.equal(twice.shared, 2 * got.shared))


@rules
def test_float64_stays_float64_and_is_more_exact(spec: RoutingSpec) -> None:
    got = route_logits(logits_of(63), spec, tensors_for(spec))
    less = route_logits(logits_of(63).float(), spec, {name: t.float() for name, t in tensors_for(spec).items()})
    assert (got.weights.dtype, less.weights.dtype) == (torch.float64, torch.float32)
    assert torch.equal(got.ids, less.ids)
    torch.testing.assert_close(got.weights, less.weights.double(), rtol=1e-5, atol=0)
    assert not torch.equal(got.weights, less.weights.double())


def test_scores_are_float32_or_in_the_dtype_of_the_logits() -> None:
    logits = logits_of(63).bfloat16()
    for spec in (RoutingSpec(3, renormalize="sum"), RoutingSpec(3, select_on="logits"), RULES["sparsemixer"]):
        precise = route_logits(logits, spec, {})
        assert precise.weights.dtype == torch.float32
        assert torch.equal(precise.weights, route_logits(logits.float(), spec, {}).weights)
        rough = route_logits(logits, fresh(replace(spec, score_dtype="input")), {})
        assert rough.weights.dtype == torch.bfloat16
        assert not torch.equal(rough.weights.float(), precise.weights)
        torch.testing.assert_close(rough.weights.float(), precise.weights, rtol=0.1, atol=0)
    exact = route_logits(logits.double(), fresh(RoutingSpec(3, score_dtype="input")), {})
    assert exact.weights.dtype == torch.float64


def test_scales_stored_in_another_dtype_leave_the_weights_in_theirs() -> None:
    tensors = {SCALE: torch.ones(12, dtype=torch.float64), GLOBAL: torch.ones(1, dtype=torch.float64)}
    got = route_logits(logits_of(3).float(), RoutingSpec(2, per_expert_scale=True, global_scale=True), tensors)
    assert got.weights.dtype == torch.float32


def test_token_ids_have_any_shape_and_integer_dtype() -> None:
    spec, table = RoutingSpec(2, selector="table"), torch.arange(22).reshape(11, 2).fmod(12)
    for dtype in (torch.int32, torch.int64):
        token_ids = torch.tensor([[0, 10], [7, 3]], dtype=dtype)
        got = route_logits(logits_of(4), spec, {TABLE: table}, token_ids=token_ids)
        assert got.ids.tolist() == [[0, 1], [8, 9], [2, 3], [6, 7]]
    many = torch.arange(300) % 11
    assert torch.equal(route_logits(logits_of(300), spec, {TABLE: table}, token_ids=many).ids, table[many])
    none = route_logits(logits_of(0), spec, {TABLE: table}, token_ids=torch.empty(0, 5, dtype=torch.int64))
    assert none.ids.shape == (0, 2)


def test_the_route_stage_hands_on_tensors_token_ids_and_sequences() -> None:
    tensors = {SCALE: torch.tensor([2, -0.7, 3, 1.4])}
    got = route(RouteInputs(torch.tensor(FOUR), replace(SUM, per_expert_scale=True), tensors))
    assert got.ids.tolist() == [[3, 1]]
    close(got.weights, [[0.8, -0.3]], torch.float32)
    table, token_ids = torch.arange(22).reshape(11, 2).fmod(12), torch.tensor([[0, 10], [7, 3]])
    by_table = route(RouteInputs(logits_of(4), RoutingSpec(2, selector="table"), {TABLE: table}, token_ids))
    assert by_table.ids.tolist() == [[0, 1], [8, 9], [2, 3], [6, 7]]
    spec, crowd = RoutingSpec(1, capacity=Capacity(1)), torch.tensor(CROWD)
    assert (route(RouteInputs(crowd, spec)).weights > 0).tolist() == [[True], [False], [False], [True]]
    assert (route(RouteInputs(crowd, spec, sequences=2)).weights > 0).tolist() == [[True], [False], [True], [True]]


STAGES = RULES | {
    "product-keys": RoutingSpec(2, selector="product_keys", select_on="logits"),
    "table": RoutingSpec(2, selector="table"),
    "capacity": RoutingSpec(2, capacity=Capacity(fraction=0.5)),
    "even-share": RoutingSpec(2, capacity=Capacity(per="batch", by_weight=True)),
}


@pytest.mark.parametrize("valid", [0, 1, 6, 9])
@pytest.mark.parametrize("spec", STAGES.values(), ids=STAGES)
def test_padding_rows_have_no_expert_and_change_no_bit_of_the_others(spec: RoutingSpec, valid: int) -> None:
    logits = logits_of(9).index_fill(0, torch.arange(valid, 9), NAN)
    tensors = {**tensors_for(spec), TABLE: torch.arange(22).reshape(11, 2).fmod(12)}
    token_ids = torch.arange(9).index_fill(0, torch.arange(valid, 9), -5)
    got = route(RouteInputs(logits, spec, tensors, token_ids, valid_rows=valid))
    alone = route(RouteInputs(logits_of(9)[:valid], spec, tensors, torch.arange(valid)))
    assert torch.equal(got.ids[:valid], alone.ids) and torch.equal(got.weights[:valid], alone.weights)
    assert (got.ids[valid:] == -1).all() and (got.weights[valid:] == 0).all()
    assert got.ids.shape == got.weights.shape == (9, spec.top_k)


def test_sequences_are_of_valid_rows() -> None:
    """Three sequences of two tokens, each with its own capacity, and two rows of padding."""
    spec, logits = RoutingSpec(1, capacity=Capacity(1)), torch.tensor([[0.0, 1.0]] * 8)
    got = route(RouteInputs(logits, spec, sequences=3, valid_rows=6))
    assert (got.weights > 0).flatten().tolist() == [True, False] * 3 + [False] * 2


@pytest.mark.parametrize("valid", [-1, 4])
def test_valid_rows_that_are_not_there_are_refused(valid: int) -> None:
    with pytest.raises(InputError, match=f"valid_rows: got {valid}, want 0 to 3"):
        route(RouteInputs(TWELVE, TOP1, valid_rows=valid))


# Softmax .1 .3 .2 .4 over four experts; the two shared ones come behind.
@pytest.mark.parametrize(
    ("spec", "fused", "ids", "weights"),
    [
        (SUM, FusedShared(2), [3, 1, 4, 5], [4 / 7, 3 / 7, 1, 1]),
        (SUM, FusedShared(1, "constant", 0.4), [3, 1, 4], [4 / 7, 3 / 7, 0.4]),
        (RoutingSpec(2, scale=2), FusedShared(2, "share", 0.5), [3, 1, 4, 5], [0.8, 0.6, 0.7, 0.7]),
        (replace(SUM, scale=2.5), FusedShared(1, "share"), [3, 1, 4], [10 / 7, 7.5 / 7, 2.5]),
        (replace(SUM, identity_experts=2), FusedShared(1), [3, 1, 4], [4 / 7, 3 / 7, 1]),
        (RoutingSpec(2, skip_expert=True), FusedShared(1), [-1, 1, 3], [0, 0.3, 1]),
    ],
    ids=["constant", "one-over-the-scale", "share", "share-of-one-scaled", "identity", "skip"],
)
def test_fused_shared_experts_are_further_slots(
    spec: RoutingSpec, fused: FusedShared, ids: list[int], weights: list[float]
) -> None:
    got = route(RouteInputs(torch.tensor([*FOUR, *FOUR, *FOUR]), spec, valid_rows=2, fused_shared=fresh(fused)))
    assert got.ids.tolist() == [ids, ids, [-1] * len(ids)]
    close(got.weights, [weights, weights, [0.0] * len(ids)], torch.float32)


def test_fused_shared_experts_have_the_weights_that_the_router_gives_them() -> None:
    inputs = RouteInputs(logits_of(5), SHARED, fused_shared=FusedShared(2, "router"))
    got, routed = route(inputs), route_logits(logits_of(5), SHARED, {})
    assert routed.shared is not None
    assert torch.equal(got.weights, torch.cat([routed.weights, routed.shared], 1))
    assert torch.equal(got.ids[:, :2], routed.ids) and got.ids[:, 2:].tolist() == [[10, 11]] * 5
    for spec, fused, there in ((SHARED, FusedShared(1, "router"), 2), (SIGMOID, FusedShared(2, "router"), 0)):
        with pytest.raises(InputError, match=rf"fused_shared.count: got {fused.count} .* want {there}, "):
            route(RouteInputs(logits_of(5), spec, fused_shared=fused))


def test_fused_shared_experts_stand_behind_all_sums_of_product_keys() -> None:
    got = route(RouteInputs(logits_of(1), KEYS, fused_shared=FusedShared(1)))
    assert got.ids[0, 2] == 36


def test_equal_scores_go_to_the_lowest_ids_in_wide_rows() -> None:
    rows = torch.zeros(3, 257)
    rows[1, 100:] = 1.0
    rows[2, ::2] = NAN
    assert top_experts(rows, 3).tolist() == [[0, 1, 2], [100, 101, 102], [0, 2, 4]]


def refused(logits: Tensor, spec: RoutingSpec, *words: str, token_ids: Tensor | None = None, **tensors: Tensor) -> Any:
    named = {f"router.{name}": tensor for name, tensor in tensors.items()}
    return pytest.param(logits, spec, named, token_ids, words, id=" ".join(words))


TWELVE = torch.zeros(3, 12)
BY_TABLE = RoutingSpec(2, selector="table")
ROWS = torch.zeros(6, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "spec", "tensors", "token_ids", "words"),
    [
        refused(torch.zeros(12), TOP1, "logits", "[12]", "[T, E]"),
        refused(torch.zeros(2, 3, 12), TOP1, "logits", "[2, 3, 12]"),
        refused(TWELVE, RoutingSpec(13), "top_k", "13", "1 to 12"),
        refused(TWELVE, RoutingSpec(0), "top_k", "got 0"),
        refused(TWELVE, RoutingSpec(11, shared_classes=2), "top_k", "11", "1 to 10"),
        refused(TWELVE, RoutingSpec(2, groups=5), "12 classes", "5 groups"),
        refused(TWELVE, RoutingSpec(2, groups=3, top_groups=4), "4", "1 to 3"),
        refused(torch.zeros(3, 7), KEYS, "7 columns"),
        refused(TWELVE, RoutingSpec(2, selection_bias=True), BIAS, "no such", "[12]"),
        refused(TWELVE, RoutingSpec(2, selection_bias=True), BIAS, "[11]", "[12]", selection_bias=torch.zeros(11)),
        refused(TWELVE, RoutingSpec(2, selection_bias=True), BIAS, "[1, 12]", selection_bias=torch.zeros(1, 12)),
        refused(TWELVE, replace(SHARED, selection_bias=True), BIAS, "[12]", "[10]", selection_bias=torch.zeros(12)),
        refused(TWELVE, RoutingSpec(2, per_expert_scale=True), SCALE, "no such", "[12]"),
        refused(TWELVE, RoutingSpec(2, per_expert_scale=True), SCALE, "[13]", per_expert_scale=torch.zeros(13)),
        refused(TWELVE, RoutingSpec(2, global_scale=True), GLOBAL, "no such", "[1]"),
        refused(TWELVE, RoutingSpec(2, global_scale=True), GLOBAL, "[12]", global_scale=torch.zeros(12)),
        refused(TWELVE, BY_TABLE, TABLE, "no such", "[any, 2]", token_ids=torch.tensor([0, 1, 2])),
        refused(TWELVE, BY_TABLE, TABLE, "[2, 6]", table=ROWS.T, token_ids=torch.tensor([0, 1, 2])),
        refused(TWELVE, BY_TABLE, "token_ids", "None", "want 3", table=ROWS),
        refused(TWELVE, BY_TABLE, "token_ids", "got 4", "want 3", table=ROWS, token_ids=torch.tensor([0, 1, 2, 3])),
        refused(TWELVE, BY_TABLE, "token_ids", "got 2", "want 3", table=ROWS, token_ids=torch.tensor([0, 1])),
        refused(TWELVE, RoutingSpec(2, global_scale=True), GLOBAL, "[]", "[1]", global_scale=torch.tensor(1.0)),
        refused(TWELVE, BY_TABLE, "token_ids", "1 to 6", "0 to 5", table=ROWS, token_ids=torch.tensor([1, 6, 2])),
        refused(TWELVE, BY_TABLE, "token_ids", "1 to 9", "0 to 5", table=ROWS, token_ids=torch.tensor([1, 9, 2])),
        refused(TWELVE, BY_TABLE, "token_ids", "-1 to 4", table=ROWS, token_ids=torch.tensor([4, -1, 2])),
    ],
)
def test_what_does_not_fit_is_refused(
    logits: Tensor, spec: RoutingSpec, tensors: dict[str, Tensor], token_ids: Tensor | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        route_logits(logits, spec, tensors, token_ids=token_ids)
    for word in words:
        assert word in str(caught.value)


def test_sequences_of_unequal_length_are_refused_where_they_compete() -> None:
    spec = RoutingSpec(2, capacity=Capacity(3))
    with pytest.raises(InputError, match=r"sequences: got 2 for 3 tokens"):
        route_logits(TWELVE, spec, {}, sequences=2)
    assert route_logits(TWELVE, spec, {}).ids.shape == (3, 2)
    batch = replace(spec, capacity=Capacity(3, per="batch"))
    assert route_logits(TWELVE, batch, {}, sequences=2).ids.shape == (3, 2)


# gelu(1), gelu(2) and gelu(40): x times the share of a normal distribution below x.
GELU = {1: 0.8413447460685429, 2: 1.9544997361036416, 40: 40.0}
ZAYA = LogitsSpec("zaya", norm_eps=3.0, width=2)
ZAYA_TENSORS = {
    "down.weight": [[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]],
    "down.bias": [0.5, -0.5],
    "norm": [2.0, 3.0],
    "fc1.weight": [[1.0, 0.0], [0.0, 1.0]],
    "fc1.bias": [0.0, 38.0],
    "fc2.weight": [[0.0, 1.0], [0.0, 0.0]],
    "fc2.bias": [-38.0, 1.0],
    "proj": [[1.0, 0.0], [0.0, 1.0], [1.0, -10.0]],
    "state_scale": [0.25, -2.0],
}


def router_tensors(values: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {f"router.{name}": torch.tensor(value, dtype=dtype) for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_logits(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype)
    tensors = router_tensors({"proj": [[1, 1], [0, 2], [-1, 0.5]], "bias": [0.25, -4, 8]}, dtype)
    plain, state = router_logits(x=x, spec=fresh(LogitsSpec()), tensors=tensors)
    assert (plain.tolist(), state) == ([[3, 4, 0], [2, -2, -3.5]], None)
    biased, _ = router_logits(x, fresh(LogitsSpec(bias=True)), tensors)
    assert biased.tolist() == [[3.25, 0, 8], [2.25, -6, 4.5]]
    assert plain.dtype == biased.dtype == dtype


def test_gemma4_logits() -> None:
    # The mean squares of x are 7.5 and 2.5, with eps 9 and 4: x is divided by 3 and 2, and by the root of its width, 2.
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 0.0, -1.0]], dtype=torch.float64)
    tensors = router_tensors({"proj": [[1, 1, 0, 0], [0, 0, 0, 1]], "scale": [6, 9, 0, 3]})
    logits, state = router_logits(x, fresh(LogitsSpec("gemma4", norm_eps=1.5)), tensors)
    assert state is None
    close(logits, [[1 + 3, 2], [6.75, -0.75]], torch.float64)


def test_zaya_logits_and_state() -> None:
    # down x is -0.5, 1; its mean square with eps is (0.25 + 1 + 6) / 2
    x = torch.tensor([[-1.0, -1.5, 0.0]], dtype=torch.float64)
    logits, state = router_logits(x, fresh(ZAYA), router_tensors(ZAYA_TENSORS))
    close(state, [[-0.5, 1.0]], torch.float64)
    second = 3.0 / math.sqrt(7.25 / 2)
    fc2 = second / 2 * (1 + math.erf(second / math.sqrt(2)))
    close(logits, [[fc2, GELU[1], fc2 - 10 * GELU[1]]], torch.float64)


def test_zaya_adds_the_state_it_is_given() -> None:
    # down x + state * scale is (-0.5 + 1.5, 1 - 2) = (1, -1), which the norm halves and scales to (1, -1.5)
    x, state = torch.tensor([[-1.0, -1.5, 0.0]], dtype=torch.float64), torch.tensor([[6.0, 1.0]], dtype=torch.float64)
    tensors = router_tensors(ZAYA_TENSORS | {"fc1.bias": [0.0, 41.5], "fc2.weight": [[0.0, 1.0], [1.0, 0.0]]})
    spec = replace(ZAYA, takes_state=True)
    logits, next_state = router_logits(x, spec, tensors, state=state)
    close(next_state, [[1.0, -1.0]], torch.float64)
    # fc1: gelu(1), gelu(40); fc2: gelu(40 - 38), gelu(gelu(1) + 1)
    last = (GELU[1] + 1) / 2 * (1 + math.erf((GELU[1] + 1) / math.sqrt(2)))
    close(logits, [[GELU[2], last, GELU[2] - 10 * last]], torch.float64)
    first, _ = router_logits(x, spec, tensors)
    assert torch.equal(first, router_logits(x, ZAYA, tensors)[0])
    assert torch.equal(first, router_logits(x, ZAYA, tensors, state=state)[0])


@pytest.mark.parametrize("kind", ["linear", "gemma4", "zaya"])
def test_logits_are_in_float32_or_in_the_dtype_of_the_input(kind: Any) -> None:
    spec = LogitsSpec(kind, bias=True, dtype="float32", width=4, takes_state=True)
    shapes = {"proj": (5, 4 if kind == "zaya" else 8), "bias": (5,), "scale": (8,), "state_scale": (4,), "norm": (4,)}
    shapes |= {"down.weight": (4, 8), "down.bias": (4,), "fc1.bias": (4,), "fc2.bias": (4,)}
    shapes |= {"fc1.weight": (4, 4), "fc2.weight": (4, 4)}
    tensors = {f"router.{name}": normal(shape, name, torch.bfloat16) for name, shape in shapes.items()}
    x, state = normal((7, 8), "x", torch.bfloat16), normal((7, 4), "state", torch.bfloat16)

    precise, next_state = router_logits(x, fresh(spec), tensors, state=state)
    exact, _ = router_logits(x.double(), spec, tensors, state=state.double())
    rough, _ = router_logits(x, replace(spec, dtype="input"), tensors, state=state)

    assert (exact.dtype, precise.dtype, rough.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    assert next_state is None or next_state.dtype == torch.float32
    torch.testing.assert_close(precise.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(precise.double(), rough.double())
    torch.testing.assert_close(rough.double(), exact, rtol=0.1, atol=0.3)
    assert router_logits(x[:0], spec, tensors, state=state[:0])[0].shape == (0, 5)


@pytest.mark.parametrize("name", ["proj", "bias", "scale"])
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_router_without_a_tensor_is_refused(name: str, fault: str) -> None:
    tensors = router_tensors({"proj": [[1.0] * 4] * 3, "bias": [1.0] * 3, "scale": [1.0] * 4})
    if fault == "missing":
        del tensors[f"router.{name}"]
    else:
        tensors[f"router.{name}"] = torch.zeros(2, 5)[:, : 1 if name == "proj" else 5]
    with pytest.raises(InputError, match=rf"router\.{name}: got"):
        router_logits(torch.ones(2, 4), LogitsSpec("gemma4", bias=True), tensors)


@pytest.mark.parametrize("name", sorted(ZAYA_TENSORS))
def test_a_zaya_router_without_a_tensor_is_refused(name: str) -> None:
    x, state, spec = torch.ones(2, 3), torch.ones(2, 2), replace(ZAYA, takes_state=True)
    tensors = router_tensors(ZAYA_TENSORS)
    with pytest.raises(InputError, match=rf"router\.{name}: got no such"):
        router_logits(x, spec, {key: tensor for key, tensor in tensors.items() if key != f"router.{name}"}, state=state)
    with pytest.raises(InputError, match=rf"router\.{name}: got shape"):
        router_logits(x, spec, tensors | {f"router.{name}": torch.zeros(4, 4)}, state=state)


ROUTERS = {
    "plain": (LogitsSpec(), RoutingSpec(2)),
    "gemma4": (LogitsSpec("gemma4", norm_eps=0.5), replace(SUM, per_expert_scale=True)),
    "zaya": (LogitsSpec("zaya", width=4, takes_state=True, dtype="float32"), RoutingSpec(1, skip_expert=True)),
    "biased": (LogitsSpec(bias=True), replace(SIGMOID, selection_bias=True, global_scale=True)),
    "table": (LogitsSpec(), RoutingSpec(2, score="sqrt_softplus", selector="table")),
    "product-keys": (LogitsSpec(), KEYS),
    "shared": (LogitsSpec(), SHARED),
}


@pytest.mark.parametrize(("logits", "routing"), ROUTERS.values(), ids=ROUTERS)
def test_the_router_module_routes_its_logits(logits: LogitsSpec, routing: RoutingSpec) -> None:
    spec = RouterSpec(fresh(logits), fresh(routing), num_experts=9, hidden_size=8, dtype=torch.bfloat16, vocab_size=11)
    handle = build_router(spec)
    assert handle.takes == "hidden"
    there = dict(handle.module.named_parameters()) | dict(handle.module.named_buffers())
    assert handle.tensors == {name: name.removeprefix("router.") for name in spec.tensors()}
    assert sorted(handle.tensors.values()) == sorted(there)
    tensors = {name: there[own] for name, own in handle.tensors.items()}
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == spec.tensors()[name]
        assert tensor.dtype == {BIAS: torch.float32, TABLE: torch.int64}.get(name, torch.bfloat16)
        assert tensor.isnan().all() if name != TABLE else (tensor < 0).all()
        assert not tensor.requires_grad
        tensor.copy_(integers(tensor.shape, name, 9) if name == TABLE else normal(tensor.shape, name) + 1.0)

    x, state = normal((6, 8), "x", torch.bfloat16), normal((6, 4), "state", torch.bfloat16)
    token_ids = torch.tensor([10, 0, 3, 3, 7, 1])
    batch = {"token_ids": token_ids} if routing.selector == "table" else {}
    weights, ids = handle.module(x, state=state, **batch)
    by_hand, _ = router_logits(x, logits, tensors, state=state)
    want = route(RouteInputs(by_hand, routing, tensors, token_ids))
    assert torch.equal(ids, want.ids) and torch.equal(weights, want.weights)


def test_the_router_module_keeps_sequences_apart() -> None:
    spec = RouterSpec(LogitsSpec(), replace(TOP1, capacity=Capacity(1)), 3, 3, torch.float32)
    module = build_router(spec).module
    module.get_parameter("proj").copy_(torch.eye(3))
    weights, _ = module(torch.tensor(CROWD), sequences=2)
    assert (weights > 0).flatten().tolist() == [True, False, True, True]


def test_an_engine_may_replace_the_routing_function_alone() -> None:
    class Backwards(Router):
        route = staticmethod(lambda inputs: Routing(*(part.flip(1) for part in route(inputs))))

    spec = RouterSpec(LogitsSpec(), SUM, 5, 8, torch.float32)
    own, other = Router(spec), Backwards(spec)
    for module in (own, other):
        module.get_parameter("proj").copy_(normal((5, 8), "proj"))
    x = normal((6, 8), "x")
    assert torch.equal(own(x)[1].flip(1), other(x)[1]) and torch.equal(own(x)[0].flip(1), other(x)[0])


def test_a_copied_or_reloaded_router_reads_its_own_tensors() -> None:
    """The function that experts were handed is bound to its router, and reads when it is called."""
    spec = RouterSpec(LogitsSpec(), replace(SUM, selection_bias=True), 5, 8, torch.float32)
    module = build_router(spec).module
    module.load_state_dict({"proj": normal((5, 8), "proj"), "selection_bias": torch.zeros(5)})
    copied, x = copy.deepcopy(module), normal((6, 8), "x")
    first = module(x)[1]
    copied.get_buffer("selection_bias").copy_(torch.tensor([0, 0, 0, 0, 9.0]))
    assert (copied(x)[1][:, 0] == 4).all()
    assert torch.equal(module(x)[1], first)
    moved = {"selection_bias": torch.tensor([9.0, 0, 0, 0, 0])}
    assert (torch.func.functional_call(module, moved, (x,))[1][:, 0] == 0).all()
