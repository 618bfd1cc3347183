"""Combine: each weight once, nothing of pairs without an expert, one rounding."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_conformance.judging import compare
from moe_conformance.judging.inputs import integers, normal, poison_, poisoned_allocations
from moe_conformance.kernels import combine as combine_kernels
from moe_conformance.kernels.combine import combine
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl.combine import combine as reference

NAN = float("nan")
EXPERTS, IDENTITY = 7, 3


def _bound(outputs: Tensor, ids: Tensor, weights: Tensor, x: Tensor, taken: Tensor, options: dict[str, Any]) -> Value:
    """The sum as the kernel computes it: products and additions in float32, one rounding to x's dtype."""
    (tokens, width), top_k = x.shape, ids.shape[1]
    rows = outputs.unflatten(0, (tokens, top_k))[..., :width].double().masked_fill(~taken[..., None], 0)
    share = (weights if options.get("weighted", True) else torch.ones_like(weights)).double().masked_fill(~taken, 0)
    identity = (ids >= EXPERTS) & (ids < EXPERTS + options.get("identity_experts", 0))
    passed = Value.of(weights.double().masked_fill(~identity, 0).T[..., None]).summed(torch.float32) * Value.of(x)
    products = (Value.of(share.T[..., None]) * Value.of(rows.transpose(0, 1))).stored(torch.float32)  # [K, T, D]
    total = (products.summed(torch.float32) + passed.stored(torch.float32)).stored(torch.float32)
    total = (total * Value.of(options.get("output_scale", 1.0))).stored(torch.float32)
    added = options.get("added")
    if isinstance(added, Tensor):
        total = (total + Value.of(added)).stored(torch.float32)
    return total.stored(x.dtype)


HALF = torch.tensor([1, -1, 0, -1, -1, 3, 2], dtype=torch.int32)
# All options, alone and together; "added" is made in the test.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"output_scale": 2.5},
    "scale and added": {"added": True, "output_scale": 2.5},
    "weighted already": {"weighted": False},
    "identity experts": {"identity_experts": IDENTITY, "output_scale": 2.5, "added": True},
    "map": {"expert_map": HALF},
    "all": {"expert_map": HALF, "weighted": False, "identity_experts": IDENTITY, "added": True},
}
SIZES = ((7, 3, 20, 24), (1, 1, 1, 1), (131, 8, 33, 33), (5, 22, 1030, 1040), (0, 3, 20, 24))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tokens, top_k, width, padded", SIZES)
@pytest.mark.parametrize("what", OPTIONS)
def test_combine_is_the_reference(
    device: str, what: str, tokens: int, top_k: int, width: int, padded: int, dtype: torch.dtype
) -> None:
    """At sizes that fill no tile; what must not be read is NaN."""
    x, added = normal((tokens, width), "x", dtype), normal((tokens, width), "added", dtype)
    options = OPTIONS[what] | ({"added": added} if "added" in OPTIONS[what] else {})
    ids = integers((tokens, top_k), "ids", EXPERTS + IDENTITY + 2, -1)
    weights = integers((tokens, top_k), "weights", 16, low=1).float() / 7
    taken = (ids >= 0) & (ids < EXPERTS)
    if "expert_map" in options:
        taken &= HALF[ids.clamp(0, EXPERTS - 1)] >= 0
    passed = (ids >= EXPERTS) & (ids < EXPERTS + options.get("identity_experts", 0))
    outputs = normal((tokens * top_k, padded), "outputs", dtype)
    outputs[:, width:] = NAN
    outputs[~taken.flatten()] = NAN
    share = weights.masked_fill(~(taken | passed), NAN)
    read = _strided(x.masked_fill(~passed.any(-1, keepdim=True), NAN), device)
    on = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    on |= {"added": _strided(added, device)} if "added" in on else {}
    with poisoned_allocations():
        got = combine(*(t.to(device) for t in (outputs, ids, share)), read, EXPERTS, **on)
    exact = {n: v.double() if n == "added" else v for n, v in options.items()}
    want = reference(outputs.double(), ids, share.double(), x.double(), EXPERTS, **exact)
    bound = _bound(outputs, ids, share, x, taken, options).bound("float32 sums, one rounding")
    compare.close("sum", got, want, bound)
    compare.same("dtype", got.dtype, dtype)


def _strided(x: Tensor, device: str) -> Tensor:
    """Every second column of poison."""
    room = poison_(torch.empty(len(x), 2 * x.shape[1] + 1, dtype=x.dtype))
    room[:, : 2 * x.shape[1] : 2] = x
    return room.to(device)[:, : 2 * x.shape[1] : 2]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_tie_of_the_one_rounding_goes_to_even(device: str, dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    x = (1 + step * torch.arange(8).view(4, 2)).to(dtype)
    half = torch.full_like(x, step / 2)
    ids, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    given = (t.to(device) for t in (x, ids, weights, x))
    got = combine(*given, EXPERTS, added=half.to(device))
    compare.equal("sum", got.float(), (x.float() + half.float()).to(dtype).float())


def test_weights_may_have_any_strides(device: str) -> None:
    x, outputs = normal((9, 20), "x"), normal((27, 20), "outputs")
    ids, weights = integers((9, 3), "ids", EXPERTS), integers((9, 3), "weights", 16, low=1).float() / 7
    room = poison_(torch.empty(6, 10))
    room[::2, :9] = weights.T
    got = combine(outputs.to(device), ids.to(device), room.to(device)[::2, :9].T, x.to(device), EXPERTS)
    everybody = torch.ones_like(ids, dtype=torch.bool)
    want = reference(outputs.double(), ids, weights.double(), x.double(), EXPERTS)
    compare.close("strided weights", got, want, _bound(outputs, ids, weights, x, everybody, {}).bound("float32 sums"))


def test_several_programs_share_a_token(device: str) -> None:
    """Columns that fill two programs and a part of a third, as compiled from 1024 on."""
    x, outputs, added = normal((5, 37), "x"), normal((15, 40), "outputs"), normal((5, 37), "added")
    ids, weights = integers((5, 3), "ids", EXPERTS + IDENTITY), integers((5, 3), "weights", 16, low=1).float() / 7
    with (
        patch.object(combine_kernels, "combine_blocks", lambda *_: {"BLOCK_T": 2, "BLOCK_D": 16}),
        poisoned_allocations(),
    ):
        got = combine(
            *(t.to(device) for t in (outputs, ids, weights, x)),
            EXPERTS,
            identity_experts=IDENTITY,
            added=added.to(device),
        )
    options = {"identity_experts": IDENTITY, "added": added}
    want = reference(
        *(t.double() if t.is_floating_point() else t for t in (outputs, ids, weights, x)),
        EXPERTS,
        identity_experts=IDENTITY,
        added=added.double(),
    )
    bound = _bound(outputs, ids, weights, x, ids < EXPERTS, options).bound("float32 sums")
    compare.close("columns of several programs", got, want, bound)


def test_offsets_of_rows_do_not_wrap(device: str) -> None:
    """Rows 2^30 elements apart, the third beyond 2^31; memory in between is never touched."""
    far = 2**30 + 16
    room = torch.empty(2 * far + 3 * 16, dtype=torch.float16, device=device)
    far_rows = {name: room[16 * i :].as_strided((3, 16), (far, 1)) for i, name in enumerate(("outputs", "x", "added"))}
    for name, rows in far_rows.items():
        rows.copy_(normal((3, 16), name, torch.float16))
    ids, weights = torch.tensor([[0], [EXPERTS], [1]]), torch.ones(3, 1)
    for last in (1, EXPERTS):  # the third token's own output, or itself
        ids[2] = last
        got = combine(
            far_rows["outputs"], ids.to(device), weights.to(device), far_rows["x"], EXPERTS,
            identity_experts=IDENTITY, added=far_rows["added"],
        )  # fmt: skip
        near = {name: rows.cpu() for name, rows in far_rows.items()}
        want = near["outputs"].where(ids < EXPERTS, near["x"]).double() + near["added"].double()
        compare.equal(f"far rows, expert {last}", got, want.half())


def test_offsets_of_columns_do_not_wrap_either(device: str) -> None:
    """Columns of x and of what is added so far apart that the third lies beyond 2^31 elements."""
    far = 2**30 + 16
    room = torch.empty(2 * far + 16, dtype=torch.float16, device=device)
    outputs, near = normal((4, 3), "outputs", torch.float16), normal((4, 3), "x", torch.float16)
    x = room.as_strided((4, 3), (1, far)).copy_(near)
    ids, weights = torch.tensor([[EXPERTS]] * 4, device=device), torch.ones(4, 1, device=device)
    got = combine(outputs.to(device), ids, weights, x, EXPERTS, identity_experts=IDENTITY, added=x)
    compare.equal("far columns", got, 2 * near)


REFUSED: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "rows": ({"outputs": torch.zeros(9, 24)}, ("[9, 24]", "12")),
    "narrow": ({"outputs": torch.zeros(12, 19)}, ("[12, 19]", "20")),
    "columns apart": ({"outputs": torch.zeros(24, 12).T}, ("contiguous",)),
    "weights": ({"weights": torch.zeros(4, 2)}, ("[4, 2]",)),
    "added": ({"added": torch.zeros(4, 9)}, ("[4, 9]",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_combine_is_refused_in_words(device: str, what: str) -> None:
    changed, words = REFUSED[what]
    given = {"outputs": torch.zeros(12, 24), "ids": torch.zeros(4, 3, dtype=torch.int64)}
    given |= {"weights": torch.zeros(4, 3), "x": torch.zeros(4, 20)} | changed
    on = {name: tensor.to(device) for name, tensor in given.items()}
    compare.refused(what, lambda: combine(**on, experts=7), words)
