"""Routing chooses and weighs as the reference does, for every method that stands in one row of logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poison_
from moe_conformance.kernels import routing
from moe_conformance.model.specs import Capacity, RoutingSpec
from moe_conformance.oracle.routing import weights_value
from moe_conformance.oracle.tolerance import relative, softmax_weights
from moe_conformance.reference_impl import routing as reference_routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# T, E, K: sizes around the tiles of both modes, the largest of each, and one of everything.
SHAPES = ((1, 1, 1), (3, 7, 5), (5, 8, 8), (63, 60, 4), (65, 128, 8), (2, 257, 9), (9, 512, 22), (3, 1024, 32))
NAN, INF = float("nan"), float("inf")


def same_routing(what: str, logits: Tensor, top_k: int, renormalize: bool, scale: Tensor | None = None) -> None:
    """The kernel's ids are the reference's, and its weights within the bound of both."""
    if scale is None:
        got = routing.softmax_topk(logits, top_k, renormalize)
        want = reference_routing.softmax_topk(logits.cpu().double(), top_k, renormalize)
    else:
        got = routing.gemma4(logits, top_k, scale)
        want = reference_routing.gemma4(logits.cpu().double(), top_k, scale.cpu())
    compare.equal(f"{what}: ids", got.ids, want.ids)
    bound = relative(want.weights, softmax_weights(logits.cpu(), top_k), torch.float32, "routing")
    compare.close(f"{what}: weights", got.weights, want.weights, bound)


def test_routing_is_the_reference_at_any_shape(device: str) -> None:
    for tokens, experts, top_k in SHAPES:
        for dtype in DTYPES:
            if experts > 256 and dtype == torch.bfloat16:
                continue  # so many values without a tie do not fit
            what = f"{tokens}x{experts} {dtype}"
            logits = distinct_logits(tokens, experts, what, dtype).to(device)
            scale = (normal((experts,), what) + 1.5).to(device, dtype)
            same_routing(what, logits, top_k, renormalize=bool(tokens % 2))
            same_routing(f"gemma4 {what}", logits, top_k, True, scale)


def test_routing_reads_strided_logits_and_nothing_beside_them(device: str) -> None:
    for dtype in DTYPES:
        room = poison_(torch.empty(2 * 37, 3 * 60 + 5, dtype=dtype))
        logits = room[1::2, 2:182:3]
        logits.copy_(distinct_logits(37, 60, "strided", dtype))
        scales = poison_(torch.empty(120, dtype=dtype))
        scales[::2] = normal((60,), "strided") + 1.5
        same_routing(f"every third column, {dtype}", room.to(device)[1::2, 2:182:3], 4, True, scales.to(device)[::2])
        same_routing(f"transposed, {dtype}", logits.T.contiguous().to(device).T, 4, False)


def test_routing_breaks_ties_to_the_lowest_id(device: str) -> None:
    for dtype in DTYPES:
        tied = integers((33, 60), "tied", 3, -1).to(dtype) * -1.0  # 0 comes as -0.0 too
        same_routing(f"tied {dtype}", tied.to(device), 9, True)
        same_routing(f"equal {dtype}", torch.full((3, 7), -2.5, dtype=dtype, device=device), 5, True)


def test_routing_of_no_numbers_is_unique_and_leaves_other_rows_alone(device: str) -> None:
    logits = distinct_logits(8, 60, "no numbers")
    logits[7, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign set
    logits[0], logits[1, 59], logits[2], logits[3, 5], logits[4, 1:], logits[5, ::2] = NAN, NAN, -INF, INF, -INF, NAN
    for top_k in (1, 4, 32):
        for dtype in DTYPES:
            rows = logits.to(dtype)
            got = routing.softmax_topk(rows.to(device), top_k, True)
            want = reference_routing.softmax_topk(rows, top_k, True)
            compare.equal("ids", got.ids, want.ids)
            compare.equal("which weights are NaN", got.weights.isnan().int(), want.weights.isnan().int())
            same_routing("the row of numbers", rows[6:7].to(device), top_k, True)


def test_routing_of_no_tokens_is_empty(device: str) -> None:
    got = routing.softmax_topk(torch.empty(0, 60, device=device), 4, True)
    compare.same("shapes", (list(got.ids.shape), list(got.weights.shape)), ([0, 4], [0, 4]))


def test_routing_refuses_what_it_cannot_do(device: str) -> None:
    def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    for what, call, words in (
        ("K > E", lambda: routing.softmax_topk(logits(2, 7), 8, True), ("8", "7")),
        ("K = 0", lambda: routing.softmax_topk(logits(2, 7), 0, True), ("0",)),
        ("K > 32", lambda: routing.softmax_topk(logits(2, 60), 33, True), ("33", "32")),
        ("E > 1024", lambda: routing.softmax_topk(logits(2, 1025), 4, True), ("1025", "1024")),
        ("three dims", lambda: routing.softmax_topk(logits(2, 3, 7), 4, True), ("[2, 3, 7]",)),
        ("integers", lambda: routing.softmax_topk(logits(2, 7, dtype=torch.int32), 4, True), ("int32",)),
        ("short scale", lambda: routing.gemma4(logits(2, 7), 4, logits(6)), ("[6]", "[7]")),
        ("scale of two dims", lambda: routing.gemma4(logits(2, 7), 4, logits(1, 7)), ("[1, 7]",)),
    ):
        compare.same(f"{what}: error", type(compare.refused(what, call, words)), InputError)


def _spec(top_k: int, **fields: Any) -> RoutingSpec:
    return RoutingSpec(top_k, **fields)


_SIGMOID = {"score": "sigmoid", "selection_bias": True}
_NOAUX = _SIGMOID | {"group_score": "top2_sum", "renormalize": "sum", "epsilon": 1e-20, "scale": 2.5}
# T, E and the method; every field that the kernel reads is off its default in one of them, alone or with others.
METHODS = {
    "DeepSeek-V3": (9, 256, _spec(8, groups=8, top_groups=4, **_NOAUX)),
    "DeepSeek-V3, groups of 5": (63, 20, _spec(3, groups=4, top_groups=2, per_expert_scale=True, **_NOAUX)),
    "groups of one": (5, 6, _spec(2, groups=6, top_groups=4, **_NOAUX)),
    "DeepSeek-V2": (9, 160, _spec(6, groups=8, top_groups=3, group_mask=0.0, scale=16.0)),
    "all groups": (5, 12, _spec(4, groups=3, top_groups=3, score="sigmoid")),
    "groups that count as 0": (33, 12, _spec(9, groups=6, top_groups=5, group_mask=0.0, **_SIGMOID)),
    "negative logits behind such groups": (
        33,
        12,
        _spec(9, groups=6, top_groups=5, group_mask=0.0, select_on="logits"),
    ),
    "sigmoid": (7, 60, _spec(4, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-6)),
    "softmax with bias": (7, 60, _spec(4, selection_bias=True, renormalize="sum", floor=0.9375)),
    "floor of a sum with epsilon": (7, 60, _spec(4, renormalize="sum", floor=0.9375, epsilon=0.125)),
    "floor": (7, 60, _spec(4, selection_bias=True, renormalize="sum", floor=1e-12)),
    "square root of softplus": (7, 257, _spec(6, score="sqrt_softplus", selection_bias=True, renormalize="sum")),
    "gpt-oss": (9, 128, _spec(4, select_on="logits")),
    "Llama 4": (9, 16, _spec(1, select_on="logits", score="sigmoid")),
    "logits with bias": (9, 32, _spec(4, select_on="logits", score="sigmoid", selection_bias=True)),
    "PhiMoE": (33, 16, _spec(2, selector="sparsemixer", select_on="logits", jitter=0.2)),
    # A logit that lies on the limit, where the bound allows it in and out.
    "PhiMoE at the limit": (33, 16, _spec(2, selector="sparsemixer", select_on="logits", jitter=0.25)),
    "DBRX": (9, 16, _spec(4, renormalize="norm", norm_order=1.0)),
    "DBRX of order 2": (9, 16, _spec(4, renormalize="norm", norm_order=2.0, scale=0.5)),
    "Laguna": (9, 60, _spec(4, score="sigmoid", logit_softcap=1.25, renormalize="sum")),
    "scale under a cap": (9, 60, _spec(4, score="sigmoid", logit_scale=1.5, logit_softcap=1.25)),
    "a tiny logit of a cap": (9, 60, _spec(4, select_on="logits", score="sigmoid", logit_softcap=64.0)),
    "Muse Spark": (9, 60, _spec(4, score="sigmoid", logit_scale=1.5, renormalize="sum", epsilon=1e-15)),
    "Inkling": (
        9,
        62,
        _spec(4, score="sigmoid", shared_classes=2, scale=2.5, global_scale=True, selection_bias=True),
    ),
    "Inkling, conditioned": (9, 62, _spec(4, score="sigmoid", shared_classes=2, logit_scale=1.5, logit_softcap=1.25)),
    "an own scale beside shared experts": (9, 62, _spec(4, score="sigmoid", shared_classes=2, per_expert_scale=True)),
    "ZAYA": (33, 9, _spec(1, skip_expert=True, selection_bias=True)),
    "skip among several": (33, 9, _spec(4, skip_expert=True, per_expert_scale=True)),
    "Gemma 4": (9, 128, _spec(8, renormalize="sum", per_expert_scale=True)),
    "both scales": (9, 128, _spec(8, per_expert_scale=True, global_scale=True, scale=2.5)),
    "K of 32": (5, 1024, _spec(32, renormalize="sum", score="sigmoid")),
    "K is E": (5, 33, _spec(32, renormalize="sum")),
}


def _tensors(spec: RoutingSpec, columns: int, device: str) -> dict[str, Tensor]:
    """Every second element of a poisoned tensor, so that a stride of one shows."""
    experts = columns - spec.shared_classes
    values = {
        "router.selection_bias": normal((experts,), "bias", std=0.25),
        "router.per_expert_scale": normal((experts,), "scale") + 1.5,
        "router.global_scale": torch.tensor([1.75]),
    }
    room = {name: poison_(torch.empty(2 * len(value))) for name, value in values.items()}
    for name, value in values.items():
        room[name][::2] = value
    return {name: tensor.to(device)[::2] for name, tensor in room.items()}


def _same_method(what: str, spec: RoutingSpec, logits: Tensor, device: str, token_ids: Tensor | None = None) -> None:
    """Ids are the reference's in float64, weights within the bound of a router that computes in float32."""
    tensors = _tensors(spec, logits.shape[1], device)
    if token_ids is not None:
        tensors["router.table"] = integers((11, spec.top_k), "table", logits.shape[1]).to(device)
    exact = {
        name: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu() for name, tensor in tensors.items()
    }
    on_device = None if token_ids is None else token_ids.to(device)
    room = poison_(torch.empty(len(logits), 2 * logits.shape[1], dtype=logits.dtype))
    room[:, ::2] = logits
    got = routing.route_logits(room.to(device)[:, ::2], spec, tensors, token_ids=on_device)
    want = reference_routing.route_logits(logits.double(), spec, exact, token_ids=token_ids)
    compare.equal(f"{what}: ids", got.ids, want.ids)
    skipped = want.weights == 0 if spec.skip_expert else None
    chosen = reference_routing.route_logits(
        logits.double(), replace(spec, skip_expert=False), exact, token_ids=token_ids
    ).ids
    weights, shared = weights_value(logits.double(), chosen, spec, exact, torch.float32, skipped)
    bound = weights.bound("roundings of float32")
    compare.close(f"{what}: weights", got.weights, want.weights, bound)
    if shared is not None:
        compare.close(f"{what}: weights of shared experts", got.shared, want.shared, shared.bound("as above"))


def test_every_method_is_the_reference(device: str) -> None:
    for what, (tokens, columns, spec) in METHODS.items():
        for dtype in DTYPES[: 3 if columns <= 256 else 1]:
            logits = distinct_logits(tokens, columns, what, dtype)
            _same_method(f"{what} {dtype}", spec, logits / 8 if "tiny" in what else logits, device)


def test_sums_that_vanish_are_the_reference(device: str) -> None:
    """Logits far below zero, where what is added to the sum decides the weights; to a softmax they are like others."""
    for score, epsilon, at in (
        ("sigmoid", 1e-20, -46.0),
        ("sigmoid", 1e-6, -14.0),
        ("sigmoid", 0.0, -60.0),
        ("sqrt_softplus", 1e-18, -82.0),
        ("sqrt_softplus", 1e-6, -28.0),
        ("sqrt_softplus", 0.0, -88.0),  # softplus is below all normal numbers, its root is not
        ("softmax", 0.0, -200.0),
    ):
        spec = _spec(4, score=score, renormalize="sum", epsilon=epsilon, scale=2.5)
        _same_method(f"{score} {epsilon}", spec, distinct_logits(9, 60, "vanish") / 8 + at, device)


def test_a_table_chooses_by_token_id(device: str) -> None:
    spec = _spec(6, score="sqrt_softplus", selector="table", renormalize="sum", scale=1.5)
    logits = distinct_logits(33, 60, "table")
    _same_method("table", spec, logits, device, integers((3, 11), "tokens", 11))


def test_ties_of_compared_values_go_to_the_lowest_id(device: str) -> None:
    """Below zero and at zero of either sign, across groups and among groups."""
    logits = torch.tensor([[-2.0, -1.0, -1.0, -2.0, -1.0, -3.0, -0.0, 0.0, 0.0, -0.0, -1.0, -1.0]]).repeat(5, 1)
    logits[1:] = -1.0
    for spec in (
        _spec(5, select_on="logits"),
        _spec(5, select_on="logits", groups=3, top_groups=2, group_score="top2_sum"),
        _spec(5, select_on="logits", groups=6, top_groups=4, group_score="max"),
    ):
        _same_method(f"{spec.groups} groups", spec, logits, device)


def test_every_method_survives_rows_of_no_numbers(device: str) -> None:
    """Ids unique and in range, those of the reference; rows of numbers between them as ever."""
    for what, (_, columns, spec) in METHODS.items():
        if spec.selector != "topk" or spec.logit_softcap or spec.skip_expert:
            continue  # a softcap turns infinities into ties that the reference orders by their last bits
        logits = distinct_logits(8, columns, what)
        logits[0], logits[1, -1], logits[2], logits[3, 2], logits[4, 1:], logits[5, ::2] = (
            NAN,
            NAN,
            -INF,
            INF,
            -INF,
            NAN,
        )
        tensors = _tensors(spec, columns, device)
        got = routing.route_logits(logits.to(device), spec, tensors).ids.cpu()
        want = reference_routing.route_logits(logits, spec, {n: t.cpu() for n, t in tensors.items()}).ids
        experts = columns - spec.shared_classes
        compare.chosen(f"{what}: ids", got, torch.zeros(8, experts), 0.0)
        compare.equal(f"{what}: ids of numbers", got[6:], want[6:])


def test_methods_that_do_not_fit_are_refused(device: str) -> None:
    logits = torch.zeros(3, 12, device=device)
    for spec, words in (
        (_spec(2, capacity=Capacity()), ("capacity",)),
        (_spec(2, selector="product_keys", select_on="logits"), ("product_keys",)),
        (_spec(2, groups=5), ("12", "5")),
        (_spec(2, groups=3, top_groups=4), ("4", "3")),
        (_spec(2, renormalize="norm", norm_order=3.0), ("3",)),
        (_spec(12, shared_classes=2), ("12", "10")),
        (_spec(2, selection_bias=True), ("router.selection_bias",)),
        (_spec(2, per_expert_scale=True), ("router.per_expert_scale",)),
    ):
        error = compare.refused(str(spec), lambda spec=spec: routing.route_logits(logits, spec, {}), words)
        compare.same("error", type(error), InputError)
