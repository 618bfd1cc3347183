"""Routing chooses and weighs as the reference does, for every method that stands in one row of logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import Capacity, FusedShared, RouteInputs, Routing, RoutingSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poison_, poisoned_allocations
from moe_conformance.kernels import routing
from moe_conformance.oracle.weights import weights_value
from moe_conformance.reference_impl import routing as reference_routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _spec(top_k: int, **fields: Any) -> RoutingSpec:
    return RoutingSpec(top_k, **fields)


_SIGMOID: dict[str, Any] = {"score": "sigmoid", "selection_bias": True}
_NOAUX = _SIGMOID | {"group_score": "top2_sum", "renormalize": "sum", "epsilon": 1e-20, "scale": 2.5}
PLAIN = _spec(4, renormalize="sum")
# T, E, K: sizes around the tiles of both modes, and the largest of each.
SHAPES = ((1, 1, 1), (3, 7, 5), (5, 8, 8), (63, 60, 4), (65, 128, 8), (2, 257, 9), (9, 512, 22), (3, 1024, 32))
# E and K of real models, each with every way to choose: among all, by a bias, and among groups.
REAL_SIZES = ((128, 8), (256, 8), (384, 8), (512, 22), (896, 16))
WAYS = {
    "softmax": {"renormalize": "sum"},
    "sigmoid with bias": _SIGMOID | {"renormalize": "sum", "epsilon": 1e-20, "scale": 2.5},
    "groups": _NOAUX | {"groups": 8, "top_groups": 4},
}
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
    "chosen by logit, normalised": (9, 60, _spec(4, score="sigmoid", select_on="logits", renormalize="sum")),
    "K of 32": (5, 1024, _spec(32, renormalize="sum", score="sigmoid")),
    "K is E": (5, 33, _spec(32, renormalize="sum")),
}


def _tensors(spec: RoutingSpec, columns: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every second element of a poisoned tensor, so that a stride of one shows."""
    experts = columns - spec.shared_classes
    values = {
        "router.selection_bias": normal((experts,), "bias", std=0.25),
        "router.per_expert_scale": (normal((experts,), "scale") + 1.5).to(dtype),
        "router.global_scale": torch.tensor([1.75], dtype=dtype),
    }
    room = {name: poison_(torch.empty(2 * len(value), dtype=value.dtype)) for name, value in values.items()}
    for name, value in values.items():
        room[name][::2] = value
    return {name: tensor.to(device)[::2] for name, tensor in room.items()}


def _exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in tensors.items()}


def _spaced(logits: Tensor, device: str) -> Tensor:
    """The same logits, every second column of a poisoned tensor."""
    room = poison_(torch.empty(len(logits), 2 * logits.shape[1], dtype=logits.dtype))
    room[:, ::2] = logits
    return room.to(device)[:, ::2]


def same_method(
    what: str, spec: RoutingSpec, logits: Tensor, device: str, token_ids: Tensor | None = None
) -> reference_routing.Routed:
    """Ids are the reference's in float64, weights within the bound of a router that computes in float32."""
    tensors = _tensors(spec, logits.shape[1], device, logits.dtype)
    if token_ids is not None:
        tensors["router.table"] = integers((11, spec.top_k), "table", logits.shape[1]).to(device)
    on_device = None if token_ids is None else token_ids.to(device)
    with poisoned_allocations():
        got = routing.route_logits(_spaced(logits, device), spec, tensors, token_ids=on_device)
    same_as_exact(what, got, spec, logits.cpu(), _exact(tensors), token_ids)
    return got


def same_as_exact(
    what: str,
    got: reference_routing.Routed,
    spec: RoutingSpec,
    logits: Tensor,
    exact: dict[str, Tensor],
    token_ids: Tensor | None = None,
) -> None:
    dtype, logits = logits.dtype, logits.double()
    want = reference_routing.route_logits(logits, spec, exact, token_ids=token_ids)
    compare.equal(f"{what}: ids", got.ids, want.ids)
    skipped = want.weights == 0 if spec.skip_expert else None
    unskipped = replace(spec, skip_expert=False)
    chosen = reference_routing.route_logits(logits, unskipped, exact, token_ids=token_ids).ids
    weights, shared = weights_value(logits, chosen, spec, exact, dtype, skipped, stored=torch.float32)
    compare.close(f"{what}: weights", got.weights, want.weights, weights.bound("roundings of float32"))
    if shared is not None:
        compare.close(f"{what}: weights of shared experts", got.shared, want.shared, shared.bound("as above"))


@dtypes
@pytest.mark.parametrize("tokens, experts, top_k", SHAPES, ids=lambda size: str(size))
def test_routing_is_the_reference_at_any_shape(
    device: str, tokens: int, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    if experts > 256 and dtype == torch.bfloat16:
        dtype = torch.float16  # so many values without a tie do not fit
    logits = distinct_logits(tokens, experts, f"{tokens}x{experts} {dtype}", dtype)
    same_method("plain", _spec(top_k, renormalize="sum" if tokens % 2 else "no"), logits, device)
    same_method("gemma4", _spec(top_k, renormalize="sum", per_expert_scale=True), logits, device)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("experts, top_k", REAL_SIZES, ids=lambda size: str(size))
def test_routers_of_real_sizes_are_the_reference(device: str, experts: int, top_k: int, way: str) -> None:
    same_method(way, _spec(top_k, **WAYS[way]), distinct_logits(5, experts, f"{way} {experts}") / 8, device)


# 16-bit floats hold so many values without a tie.
_STORED = [(what, dtype) for what, (_, columns, _) in METHODS.items() for dtype in DTYPES[: 3 if columns <= 256 else 1]]


@pytest.mark.parametrize("what, dtype", _STORED, ids=str)
def test_every_method_is_the_reference(device: str, what: str, dtype: torch.dtype) -> None:
    tokens, columns, spec = METHODS[what]
    logits = distinct_logits(tokens, columns, what, dtype)
    same_method(what, spec, logits / 8 if "tiny" in what else logits, device)


NARROW = {name: replace(METHODS[name][2], score_dtype="input") for name in (
    "gpt-oss", "Llama 4", "PhiMoE", "DBRX of order 2", "Laguna", "Inkling, conditioned", "ZAYA", "Gemma 4", "floor",
    "DeepSeek-V3, groups of 5",
        "both scales", "logits with bias", "DeepSeek-V2",
)}  # fmt: skip


@pytest.mark.parametrize("what", NARROW)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scores_of_the_logits_dtype_are_rounded_at_each_step(device: str, what: str, dtype: torch.dtype) -> None:
    """Ids are those of the same steps in torch; weights are numbers of that dtype, each within its roundings."""
    (tokens, columns, _), spec = METHODS[what], NARROW[what]
    logits = distinct_logits(tokens, columns, what, dtype)
    tensors = _tensors(spec, columns, device, dtype)
    got = routing.route_logits(_spaced(logits, device), spec, tensors)
    want = reference_routing.route_logits(logits, spec, {name: t.cpu() for name, t in tensors.items()})
    compare.equal("ids", got.ids, want.ids)
    compare.equal("numbers of that dtype", got.weights, got.weights.to(dtype).float())
    skipped = want.weights == 0 if spec.skip_expert else None
    weights, _ = weights_value(logits.double(), want.ids.clamp(min=0), spec, _exact(tensors), dtype, skipped)
    compare.close("weights", got.weights, weights.exact, weights.bound(f"roundings of {dtype}"))
    # An exponential's last bit decides a rounding now and then; a step that is not rounded shows in many weights.
    same = (got.weights.cpu() == want.weights.float()).double().mean().item()
    compare.same(f"{same:.3f} of the weights are torch's", same >= 0.95, True)


@dtypes
def test_routing_reads_transposed_logits(device: str, dtype: torch.dtype) -> None:
    logits = distinct_logits(37, 60, "strided", dtype)
    got = routing.route_logits(logits.T.contiguous().to(device).T, PLAIN, {})
    same_as_exact("transposed", got, PLAIN, logits, {})


@dtypes
def test_routing_breaks_ties_to_the_lowest_id(device: str, dtype: torch.dtype) -> None:
    tied = integers((33, 60), "tied", 3, -1).to(dtype) * -1.0  # 0 comes as -0.0 too
    same_method("tied", _spec(9, renormalize="sum"), tied, device)
    same_method("equal", _spec(5, renormalize="sum"), torch.full((3, 7), -2.5, dtype=dtype), device)


@pytest.mark.parametrize("fields", (
    {}, {"groups": 3, "top_groups": 2, "group_score": "top2_sum"}, {"groups": 6, "top_groups": 4, "group_score": "max"}
), ids=("one group", "three groups", "six groups"))  # fmt: skip
def test_ties_of_compared_values_go_to_the_lowest_id(device: str, fields: dict[str, Any]) -> None:
    """Below zero and at zero of either sign, across groups and among groups."""
    logits = torch.tensor([[-2.0, -1.0, -1.0, -2.0, -1.0, -3.0, -0.0, 0.0, 0.0, -0.0, -1.0, -1.0]]).repeat(5, 1)
    logits[1:] = -1.0
    same_method("tied", _spec(5, select_on="logits", **fields), logits, device)


@dtypes
@pytest.mark.parametrize("top_k", (1, 4, 32))
def test_rows_of_no_numbers_leave_other_rows_alone(device: str, top_k: int, dtype: torch.dtype) -> None:
    logits = distinct_logits(8, 60, "no numbers")
    logits[7, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign set
    logits[0], logits[1, 59], logits[2], logits[3, 5], logits[4, 1:], logits[5, ::2] = NAN, NAN, -INF, INF, -INF, NAN
    spec, rows = _spec(top_k, renormalize="sum"), logits.to(dtype)
    got = routing.route_logits(rows.to(device), spec, {})
    want = reference_routing.route_logits(rows, spec, {})
    compare.equal("ids", got.ids, want.ids)
    compare.equal("which weights are NaN", got.weights.isnan().int(), want.weights.isnan().int())
    same_method("the row of numbers", spec, rows[6:7], device)


# A softcap turns infinities into ties that the reference orders by their last bits.
_BY_VALUE = [
    what for what, (_, _, spec) in METHODS.items()
    if spec.selector == "topk" and not spec.logit_softcap and not spec.skip_expert
]  # fmt: skip


@pytest.mark.parametrize("what", _BY_VALUE)
def test_every_method_survives_rows_of_no_numbers(device: str, what: str) -> None:
    """Ids unique and in range; rows of numbers between them as ever."""
    _, columns, spec = METHODS[what]
    logits = distinct_logits(8, columns, what)
    logits[0], logits[1, -1], logits[2], logits[3, 2], logits[4, 1:], logits[5, ::2] = NAN, NAN, -INF, INF, -INF, NAN
    tensors = _tensors(spec, columns, device)
    got = routing.route_logits(logits.to(device), spec, tensors).ids.cpu()
    want = reference_routing.route_logits(logits, spec, {n: t.cpu() for n, t in tensors.items()}).ids
    experts = columns - spec.shared_classes
    assert int(got.min()) >= 0 and int(got.max()) < experts
    assert got.cpu().sort(-1).values.diff(dim=-1).ne(0).all()
    compare.equal("ids of numbers", got[6:], want[6:])


@pytest.mark.parametrize("score, epsilon, at", (
    ("sigmoid", 1e-20, -46.0),
    ("sigmoid", 1e-6, -14.0),
    ("sigmoid", 0.0, -60.0),
    ("sqrt_softplus", 1e-18, -82.0),
    ("sqrt_softplus", 1e-6, -28.0),
    ("sqrt_softplus", 0.0, -88.0),  # softplus is below all normal numbers, its root is not
    ("softmax", 0.0, -200.0),
))  # fmt: skip
def test_sums_that_vanish_are_the_reference(device: str, score: Any, epsilon: float, at: float) -> None:
    """Logits far below zero, where what is added to the sum decides the weights; to a softmax they are like others."""
    spec = _spec(4, score=score, renormalize="sum", epsilon=epsilon, scale=2.5)
    same_method(score, spec, distinct_logits(9, 60, "vanish") / 8 + at, device)


def test_a_table_chooses_by_token_id(device: str) -> None:
    spec = _spec(6, score="sqrt_softplus", selector="table", renormalize="sum", scale=1.5)
    same_method("table", spec, distinct_logits(33, 60, "table"), device, integers((3, 11), "tokens", 11))


def test_routing_of_no_tokens_is_empty(device: str) -> None:
    got = routing.route_logits(torch.empty(0, 60, device=device), PLAIN, {})
    compare.same("shapes", (list(got.ids.shape), list(got.weights.shape)), ([0, 4], [0, 4]))


def same_route(device: str, logits: Tensor, spec: RoutingSpec, **batch: Any) -> Routing:
    """Ids, where they are -1, and weights to the last few bits are those of the reference's `route`."""
    tensors = _tensors(spec, logits.shape[1], device)
    tensors |= {"router.table": batch.pop("table").to(device)} if "table" in batch else {}
    on = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}
    with poisoned_allocations():
        got = routing.route(RouteInputs(_spaced(logits, device), spec, tensors, **on))
    want = reference_routing.route(RouteInputs(logits.double(), spec, _exact(tensors), **batch))
    compare.equal("ids", got.ids, want.ids)
    torch.testing.assert_close(got.weights.cpu().double(), want.weights, rtol=2e-6, atol=0)
    return got


@pytest.mark.parametrize("valid", (0, 1, 6, 11))
def test_padding_rows_name_nobody_and_change_no_bit(device: str, valid: int) -> None:
    """Whatever stands in them, NaN included."""
    spec = METHODS["DeepSeek-V3, groups of 5"][2]
    logits = distinct_logits(11, 20, "padded")
    alone = routing.route(RouteInputs(logits[:valid].to(device), spec, _tensors(spec, 20, device)))
    for behind in (NAN, INF, 0.0):
        logits[valid:] = behind
        got = same_route(device, logits, spec, valid_rows=valid)
        compare.equal("bits of the valid rows", got.weights[:valid], alone.weights)
        compare.equal("ids of padding", got.ids[valid:], torch.full((11 - valid, 3), -1))
        compare.equal("weights of padding", got.weights[valid:], torch.zeros(11 - valid, 3))


def test_padding_rows_need_no_token_id(device: str) -> None:
    spec = _spec(6, score="sqrt_softplus", selector="table", renormalize="sum")
    tokens = integers((9,), "tokens", 11)
    tokens[5:] = 2**40
    table = integers((11, 6), "table", 60)
    same_route(device, distinct_logits(9, 60, "table"), spec, table=table, token_ids=tokens, valid_rows=5)


FUSED = {
    "one of a constant weight": (60, _spec(4, renormalize="sum"), FusedShared(1, weight=0.4)),
    "two with a share of the sum": (60, _spec(4, score="sigmoid", scale=2.5), FusedShared(2, "share", 0.5)),
    "beside identity experts": (60, _spec(4, identity_experts=8), FusedShared(2)),
    "as the router weighs them": (62, METHODS["Inkling"][2], FusedShared(2, "router")),
    "beside those that the router weighs": (62, METHODS["Inkling"][2], FusedShared(3, "share")),
    "beside a class that is no expert": (33, _spec(4, skip_expert=True), FusedShared(1)),
    "none, though the router weighs them": (62, METHODS["Inkling"][2], None),
    "up to the last slot": (60, _spec(30, renormalize="sum"), FusedShared(2)),
}


@pytest.mark.parametrize("valid", (None, 5))
@pytest.mark.parametrize("what", FUSED)
def test_shared_experts_fill_further_slots(device: str, what: str, valid: int | None) -> None:
    columns, spec, fused = FUSED[what]
    same_route(device, distinct_logits(9, columns, "fused") / 8, spec, fused_shared=fused, valid_rows=valid)


@pytest.mark.parametrize("spec, columns, words", (
    (_spec(8), 7, ("8", "7")),
    (_spec(0), 7, ("0",)),
    (_spec(2, groups=5), 12, ("12", "5")),
    (_spec(2, groups=3, top_groups=4), 12, ("4", "3")),
    (_spec(12, shared_classes=2), 12, ("12", "10")),
    (_spec(2, selection_bias=True), 12, ("router.selection_bias",)),
    (_spec(2, per_expert_scale=True), 12, ("router.per_expert_scale", "[11]", "[12]")),
    (_spec(2, global_scale=True), 12, ("router.global_scale", "[1, 1]")),
), ids=str)  # fmt: skip
def test_routing_refuses_what_does_not_fit(
    device: str, spec: RoutingSpec, columns: int, words: tuple[str, ...]
) -> None:
    tensors = {"router.per_expert_scale": torch.zeros(11), "router.global_scale": torch.zeros(1, 1)}
    on = {name: tensor.to(device) for name, tensor in tensors.items()}
    logits = torch.zeros(3, columns, device=device)
    error = compare.refused("call", lambda: routing.route_logits(logits, spec, on), words)
    compare.same("error", type(error), InputError)


@pytest.mark.parametrize("logits, words", (
    (torch.zeros(2, 3, 7), r"\[2, 3, 7\]"), (torch.zeros(2, 7, dtype=torch.int32), "int32"),
), ids=("three dims", "integers"))  # fmt: skip
def test_routing_refuses_what_are_no_logits(device: str, logits: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        routing.route_logits(logits.to(device), PLAIN, {})


@pytest.mark.parametrize("spec, columns, words", (
    (_spec(2, capacity=Capacity()), 12, "capacity"),
    (_spec(2, selector="product_keys", select_on="logits"), 12, "product_keys"),
    (_spec(2, renormalize="norm", norm_order=3.0), 12, "norm_order.* 3"),
    (_spec(33), 60, "33 .* 32"),
    (_spec(4), 1025, "1025 .* 1024"),
), ids=str)  # fmt: skip
def test_routing_of_other_routers_is_unsupported(device: str, spec: RoutingSpec, columns: int, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        routing.route_logits(torch.zeros(3, columns, device=device), spec, {})


@pytest.mark.parametrize("batch, words", (
    ({"valid_rows": 4}, "4.* 0 to 3"),
    ({"valid_rows": -1}, "-1"),
    ({"fused_shared": FusedShared(1, "router")}, "shared_classes"),
), ids=str)  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(device: str, batch: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        routing.route(RouteInputs(torch.zeros(3, 12, device=device), PLAIN, **batch))


def test_more_slots_than_a_program_holds_are_unsupported(device: str) -> None:
    inputs = RouteInputs(torch.zeros(3, 60, device=device), _spec(31), fused_shared=FusedShared(2))
    with pytest.raises(Unsupported, match=r"33 .* 32"):
        routing.route(inputs)
