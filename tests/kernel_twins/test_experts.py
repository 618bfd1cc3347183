"""Both projections, pair by pair and summed, within the bound of float32 sums and one rounding a stored tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_twins.expert_cases import (
    DTYPES,
    LIMIT,
    SPECS,
    TILES,
    dispatched_of,
    ids_of,
    same_sum,
    share_of,
    weights_of,
)
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora, LoraSpec, MLPSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poison_, poisoned_allocations
from moe_conformance.kernels import experts, grouped_matmul
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.kernels.grouped_kernel import Dispatched
from moe_conformance.kernels.tuning import Config, Tile
from moe_conformance.oracle.activation import activated
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl import grouped_matmul as reference_grouped


def _inside(spec: MLPSpec, x: Tensor, w: Tensor, bias: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Value:
    """What enters w2 for rows x [n, D] of one expert, with the spread of a kernel that stores it in dtype."""
    both = Value.of(x).project(w, torch.float32)
    if spec.weight_on == "input":
        both = (both * Value.of(weight)).stored(torch.float32)
    if bias is not None:
        both = (both + Value.of(bias)).stored(torch.float32)
    gate, up = (both[:, : spec.width], both[:, spec.width :]) if spec.gated else (both, None)
    inner = activated(gate, up, spec, Storage.stored(torch.float32))
    return (inner * Value.of(weight) if spec.weight_on == "w2_input" else inner).stored(dtype)


def _same_gate_up(
    what: str, got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, spec: MLPSpec, ids: Tensor, share: Tensor
) -> None:
    """Rows of kept pairs within their bound of the reference; all others as they were before, which is poison."""
    exact = None if bias is None else bias.double()
    want = reference_grouped.gate_up(x.double(), w.double(), spec, ids, bias=exact, weights=share.double())
    top_k = ids.shape[1]
    for expert in range(len(w)):
        rows = (ids.flatten() == expert).nonzero().flatten()
        own = None if bias is None else bias[expert]
        value = _inside(spec, x[rows // top_k], w[expert], own, share.reshape(-1, 1)[rows], got.dtype)
        compare.close(f"{what}: expert {expert}", got.cpu()[rows], want[rows], value.bound("one kernel"))
    named = ((ids >= 0) & (ids < len(w))).flatten()
    compare.equal(f"{what}: rows of no expert", got.cpu()[~named], want[~named])


# Tokens, tile, whether pairs are sorted: each pair in a program of its own is for few.
WAYS = ((23, "many tiles", True), (23, "groups of three", True), (5, "one tile", False))


specs = pytest.mark.parametrize("name", SPECS)
ways = pytest.mark.parametrize("tokens, tile, sort", WAYS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _in_turn(name: str, number: int) -> torch.dtype:
    """A dtype for each spec and number, so that every spec meets every dtype somewhere."""
    return DTYPES[([*SPECS].index(name) + number) % 3]


@ways
@specs
def test_gate_up_is_the_reference(device: str, name: str, tokens: int, tile: str, sort: bool) -> None:
    top_k, count, hidden = 3, 5, 40
    spec, dtype = SPECS[name], _in_turn(name, [*TILES].index(tile))
    tensors, x = weights_of(spec, hidden, count, dtype), normal((tokens, hidden), "x", dtype)
    w, bias = (tensors.get(f"experts.{part}{'13' if spec.gated else '1'}") for part in "wb")
    ids, share = ids_of(tokens, top_k, count, dropped=True), share_of(tokens, top_k)
    with poisoned_allocations():
        got = grouped_matmul.gate_up(
            x.to(device),
            w.to(device),
            spec,
            dispatched_of(ids, count, 16, sort, device),
            TILES[tile],
            bias=None if bias is None else bias.to(device),
            weights=share.to(device),
        )
    _same_gate_up("gate_up", got, x, w, bias, spec, ids, share)


VALUES = torch.tensor(
    [0.0, 2.0**-30, -(2.0**-12), 0.01, -0.25, 0.25, LIMIT, -LIMIT, 0.7421875, 1.5, -3.0, 8.0, -9.0, 20.0, -40.0, 95.0]
)


@pytest.mark.parametrize("up", (torch.ones(len(VALUES)), VALUES.flip(0)), ids=("up of 1", "up of values"))
@specs
def test_activations_of_exact_inputs_are_the_reference(device: str, name: str, up: Tensor) -> None:
    """Products of one term, so that gate and up are what the case says: tiny, large, around a clamp, infinite."""
    gates = torch.cat([VALUES, -VALUES, VALUES / 3])
    spec = replace(SPECS[name], width=len(VALUES), bias=False, weight_on="output")
    # Expert 0 computes gate = x0 values; x is one column that matters and 15 of zeros.
    rows = torch.cat([VALUES, up]) if spec.gated else VALUES
    w, x = torch.zeros(1, len(rows), 16), torch.zeros(len(gates), 16)
    w[0, :, 0], x[:, 0] = rows, gates
    ids = torch.zeros(len(gates), 1, dtype=torch.int64)
    dispatched = dispatched_of(ids, 1, 16, True, device)
    got = grouped_matmul.gate_up(x.to(device), w.to(device), spec, dispatched, TILES["one tile"])
    _same_gate_up("gate_up", got, x, w, None, spec, ids, torch.ones(len(gates), 1))


def test_interleaved_rows_are_gate_and_up_in_turn(device: str) -> None:
    spec, count = SPECS["gpt-oss"], 5
    tensors, x, ids = (
        weights_of(spec, 40, count, torch.float32),
        normal((9, 40), "x"),
        ids_of(9, 3, count, dropped=False),
    )
    w, bias = tensors["experts.w13"], tensors["experts.b13"]
    turns = torch.arange(2 * spec.width).view(2, spec.width).T.flatten()
    got = grouped_matmul.gate_up(
        x.to(device),
        w[:, turns].to(device),
        spec,
        dispatched_of(ids, count, 16, True, device),
        TILES["many tiles"],
        bias=bias[:, turns].to(device),
        interleaved=True,
    )
    _same_gate_up("interleaved", got, x, w, bias, spec, ids, share_of(9, 3))


def test_strides_and_padded_columns_are_honoured(device: str) -> None:
    """x and w transposed in memory, poison between rows, behind the last column of w and between elements of b."""
    spec, count, hidden = SPECS["gpt-oss"], 5, 40
    tensors, ids = weights_of(spec, hidden, count, torch.float16), ids_of(9, 3, count, dropped=False)
    x, w, bias = normal((9, hidden), "x", torch.float16), tensors["experts.w13"], tensors["experts.b13"]
    apart = poison_(torch.empty(count, 2 * w.shape[1], dtype=w.dtype))
    apart[:, ::2] = bias
    columns = poison_(torch.empty(count, hidden + 8, w.shape[1] + 3, dtype=w.dtype)).transpose(1, 2)
    columns[:, : w.shape[1], :hidden] = w
    rows = poison_(torch.empty(count, w.shape[1], 2 * hidden + 9, dtype=w.dtype))
    rows[:, :, 1 : 2 * hidden + 1 : 2] = w
    wide = poison_(torch.empty(hidden, 2 * 9, dtype=x.dtype))
    wide[:, ::2] = x.T
    for what, laid_out in (
        ("transposed w", columns.to(device)[:, : w.shape[1]]),
        ("every second column", rows.to(device)[:, :, 1::2]),
    ):
        dispatched = dispatched_of(ids, count, 16, True, device)
        rows_of_x, own = wide.to(device).T[::2], apart.to(device)[:, ::2]
        got = grouped_matmul.gate_up(rows_of_x, laid_out, spec, dispatched, TILES["many tiles"], bias=own)
        _same_gate_up(what, got, x, w, bias, spec, ids, share_of(9, 3))


@pytest.mark.parametrize("has_bias", (False, True), ids=("no bias", "bias"))
@ways
@dtypes
def test_down_is_the_reference(
    device: str, dtype: torch.dtype, tokens: int, tile: str, sort: bool, has_bias: bool
) -> None:
    top_k, count, hidden, width = 3, 5, 40, 37
    ids = ids_of(tokens, top_k, count, dropped=True)
    rows = normal((tokens * top_k, width), "rows", dtype)
    w, bias = normal((count, hidden, width), "w2", dtype, 0.25), normal((count, hidden), "b2", dtype)
    # What stands in the row of a pair without an expert is poison, as gate_up leaves it.
    nobody = ~((ids >= 0) & (ids < count)).flatten()
    rows[nobody] = float("nan")
    dispatched = dispatched_of(ids, count, 16, sort, device)
    own = bias.to(device) if has_bias else None
    with poisoned_allocations():
        got = grouped_matmul.down(rows.to(device), w.to(device), dispatched, TILES[tile], bias=own).cpu()
    exact = bias.double() if has_bias else None
    want = reference_grouped.down(rows.double(), w.double(), ids, bias=exact)
    for expert in range(count):
        at = (ids.flatten() == expert).nonzero().flatten()
        value = Value.of(rows[at]).project(w[expert], torch.float32)
        value = (value + Value.of(bias[expert])).stored(torch.float32) if has_bias else value
        compare.close(f"expert {expert}", got[at], want[at], value.stored(dtype).bound("one kernel"))
    compare.equal("rows of no expert", got[nobody], want[nobody])


SUMS = {
    "plain": {},
    "all that is added": {"identity_experts": 3, "output_scale": 2.5, "added": True},
}


@pytest.mark.parametrize("options", SUMS)
@pytest.mark.parametrize("tokens, top_k", ((1, 2), (7, 3), (67, 8), (0, 3)), ids=str)
@specs
def test_the_routed_sum_is_the_reference(device: str, name: str, tokens: int, top_k: int, options: str) -> None:
    """Few pairs and many, none, with identity experts and what is always on."""
    spec, hidden, count, dtype = SPECS[name], 40, 11, _in_turn(name, tokens)
    tensors, x = weights_of(spec, hidden, count, dtype), normal((tokens, hidden), "x", dtype)
    ids, share = ids_of(tokens, top_k, count, dropped=True), share_of(tokens, top_k)
    ids = ids.where(ids != 3, count + 1)
    given: dict[str, Any] = {**SUMS[options]}
    given |= {"added": normal((tokens, hidden), "added", dtype)} if "added" in given else {}
    on = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in given.items()}
    turned = [t.to(device).T.contiguous().T for t in (ids, share)]
    with poisoned_allocations():
        got = experts.routed_experts(x.to(device), spec, {n: t.to(device) for n, t in tensors.items()}, *turned, **on)
    same_sum("sum", got, x, spec, tensors, ids, share, **given)


# Widths of most models: experts narrower than half of the hidden dim, beyond one tile and no multiple of it, and wider.
# The last has more experts than pairs.
@pytest.mark.parametrize("hidden, width, count", ((136, 24, 7), (40, 150, 7), (150, 70, 7), (20, 9, 600)), ids=str)
@pytest.mark.parametrize("gated", (True, False), ids=("gate", "no gate"))
def test_sizes_of_any_proportion_are_the_reference(
    device: str, hidden: int, width: int, count: int, gated: bool
) -> None:
    spec = MLPSpec(width, gated=gated)
    tensors, x = weights_of(spec, hidden, count, torch.bfloat16), normal((9, hidden), "x", torch.bfloat16)
    ids, share = ids_of(9, 3, count, dropped=True), share_of(9, 3)
    on = {n: t.to(device) for n, t in tensors.items()}
    with poisoned_allocations():
        got = experts.routed_experts(x.to(device), spec, on, ids.to(device), share.to(device))
    same_sum("sum", got, x, spec, tensors, ids, share)


def test_an_output_norm_stands_before_the_weight(device: str) -> None:
    spec = MLPSpec(37, output_norm=0.125)
    tensors, x = weights_of(spec, 40, 5, torch.float32), normal((9, 40), "x")
    ids, share = ids_of(9, 3, 5, dropped=True), share_of(9, 3)
    on = {n: t.to(device) for n, t in tensors.items()}
    with poisoned_allocations():
        got = experts.routed_experts(x.to(device), spec, on, ids.to(device), share.to(device))
    same_sum("output norm", got, x, spec, tensors, ids, share)


@pytest.mark.parametrize("tokens, top_k", ((1, 2), (23, 3)), ids=str)
def test_a_rank_adds_its_own_experts_alone(device: str, tokens: int, top_k: int) -> None:
    """By the stage, with a map, few pairs and many, and identity experts; the weights of other ranks' pairs are NaN."""
    spec, count = SPECS["gpt-oss"], 11
    expert_map = torch.full((count,), -1, dtype=torch.int32)
    expert_map[torch.tensor([7, 0, 10, 3])] = torch.arange(4, dtype=torch.int32)
    tensors, x = weights_of(spec, 40, 4, torch.float32), normal((tokens, 40), "x")
    ids = ids_of(tokens, top_k, count, dropped=True)
    ids = ids.where(ids != 1, count + 1)
    given: dict[str, Any] = {"expert_map": expert_map, "identity_experts": 2, "output_scale": 2.5}
    there = ((ids >= 0) & (ids < count) & (expert_map[ids.clamp(0, count - 1)] >= 0)) | (ids == count + 1)
    share = share_of(tokens, top_k).masked_fill(~there, float("nan"))
    inputs = ExpertsInputs(
        x.to(device), spec, {n: t.to(device) for n, t in tensors.items()}, ids.to(device), share.to(device), **given
    )
    with poisoned_allocations():
        got = experts.experts(replace(inputs, expert_map=expert_map.to(device)))
    same_sum("part", got, x, spec, tensors, ids, share.nan_to_num(), **given)


def test_adapters_are_unsupported(device: str) -> None:
    spec = LoraSpec(1, 4, 8.0)
    lora = Lora(spec, {}, torch.zeros(3, dtype=torch.int64))
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(Unsupported, match="lora"):
        experts.experts(ExpertsInputs(torch.zeros(3, 16), MLPSpec(16), {}, ids, weights, lora=lora))


PADDED = {name: SPECS[name] for name in ("silu", "gpt-oss", "relu2, no gate")} | {
    "output norm": MLPSpec(37, output_norm=0.125)
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_widths_are_cut_by_masks(device: str, name: str) -> None:
    """Weights as a load pads them: NaN behind the true hidden dim, zeros behind the true intermediate one."""
    hidden, padded, wide, spec = 40, 48, 64, PADDED[name]
    tensors, x = weights_of(spec, hidden, 5, torch.float32), normal((9, hidden), "x")
    ids, share = ids_of(9, 3, 5, dropped=False), share_of(9, 3)
    halves, first = (2, "13") if spec.gated else (1, "1")
    w1 = torch.zeros(5, halves, wide, padded)
    w1[..., hidden:] = float("nan")
    w1[:, :, : spec.width, :hidden] = tensors[f"experts.w{first}"].view(5, halves, spec.width, hidden)
    w2 = torch.full((5, padded, wide), float("nan"))
    w2[:, :hidden] = 0
    w2[:, :hidden, : spec.width] = tensors["experts.w2"]
    on = {f"experts.w{first}": w1.flatten(1, 2), "experts.w2": w2}
    if spec.output_norm:
        on["experts.output_norm"] = tensors["experts.output_norm"]
    if spec.bias:
        b1 = torch.zeros(5, halves, wide)
        b1[..., : spec.width] = tensors[f"experts.b{first}"].view(5, halves, spec.width)
        b2 = torch.full((5, padded), float("nan"))
        b2[:, :hidden] = tensors["experts.b2"]
        on |= {f"experts.b{first}": b1.flatten(1), "experts.b2": b2}
    got = experts.routed_experts(
        x.to(device), spec, {n: t.to(device) for n, t in on.items()}, ids.to(device), share.to(device)
    )
    same_sum("sum", got, x, spec, tensors, ids, share)


def test_tiles_change_no_bit_but_the_order_of_sums(device: str) -> None:
    """Blocks of pairs of any height and in any order compute each row alike; twice is the same bits."""
    spec, dtype = SPECS["silu"], torch.float32
    tensors, x = weights_of(spec, 40, 5, dtype), normal((17, 40), "x", dtype)
    ids, share = ids_of(17, 3, 5, dropped=True), share_of(17, 3)
    on = {n: t.to(device) for n, t in tensors.items()}
    outputs = {}
    for block, group, sort in ((16, 1, True), (16, 8, True), (64, 3, True), (16, 8, False), (16, 1, True)):
        tile = Tile(16, 16, group_m=group)
        got = experts.compute(x.to(device), spec, on, ids.to(device), share.to(device), Config(block, tile, tile, sort))
        same_sum(f"blocks of {block}", got, x, spec, tensors, ids, share)
        outputs[block, group, sort] = got
    first = outputs[16, 1, True]
    for key, got in outputs.items():
        # Another height of block, or row of it, may be another order of sums, in a matrix instruction as in a library.
        if (key[0], key[2]) == (16, True):
            compare.equal(f"blocks of {key[0]} in groups of {key[1]}", got, first)


# Experts, or rows of one and those of x, 2^30 elements apart.
FAR = 2**30 + 16
FAR_APART = {"experts": ((3, 16, 16), (FAR, 16, 1)), "rows": ((1, 3, 16), (16, FAR, 1))}


@pytest.mark.parametrize("what", FAR_APART)
def test_offsets_of_experts_do_not_wrap(device: str, what: str) -> None:
    """The third beyond 2^31: strides have 32 bits, offsets 64. Memory in between is never touched."""
    shape, strides = FAR_APART[what]
    w = torch.empty(2 * FAR + 16 * 16, dtype=torch.float16, device=device).as_strided(shape, strides)
    w.copy_(normal(shape, what, torch.float16))
    x = torch.empty(2 * FAR + 16, dtype=torch.float16, device=device).as_strided((3, 16), (FAR, 1))
    x.copy_(normal((3, 16), "x", torch.float16))
    ids = torch.full((3, 1), shape[0] - 1)
    got = grouped_matmul.down(x, w, dispatched_of(ids, shape[0], 16, True, device), TILES["one tile"])
    value = Value.of(x.cpu()).project(w[-1].cpu(), torch.float32).stored(torch.float16)
    compare.close(f"far {what}", got, value.exact, value.bound("one kernel"))


@pytest.mark.parametrize("what", ("x", "w"))
def test_offsets_of_columns_do_not_wrap(device: str, what: str) -> None:
    """Columns of x, and of w, so far apart that the last of a step lies beyond 2^31 elements."""
    far = 2**27 + 2**24
    near_x, near_w = normal((3, 16), "x", torch.float16), normal((2, 16, 16), "w", torch.float16)
    room = torch.empty(15 * far + 512, dtype=torch.float16, device=device)
    x, w = near_x.to(device), near_w.to(device)
    if what == "x":
        x = room.as_strided((3, 16), (1, far)).copy_(near_x)
    else:
        w = room.as_strided((2, 16, 16), (16, 1, far)).copy_(near_w)
    dispatched = dispatched_of(torch.ones(3, 1, dtype=torch.int64), 2, 16, True, device)
    got = grouped_matmul.down(x, w, dispatched, TILES["one tile"])
    value = Value.of(near_x).project(near_w[1], torch.float32).stored(torch.float16)
    compare.close(f"far columns of {what}", got, value.exact, value.bound("one kernel"))


@pytest.mark.parametrize("sort", (True, False), ids=("sorted", "unsorted"))
def test_a_map_never_leads_beyond_the_weights(device: str, sort: bool) -> None:
    """A local id that no expert has is nobody's: its rows are not written, and nothing behind the weights is read."""
    w, x = normal((2, 16, 16), "w"), normal((3, 16), "x")
    ids, expert_map = torch.tensor([[0], [1], [2]]), torch.tensor([1, 2, 0], dtype=torch.int32)
    on = (ids.to(device), 3, 16), expert_map.to(device)
    aligned = align(on[0][0], 3, 16, on[1]) if sort else None
    with poisoned_allocations():
        got = grouped_matmul.down(x.to(device), w.to(device), Dispatched(*on[0], aligned, on[1]), TILES["one tile"])
    compare.equal("the pair of local expert 2 of 2", got[1].isnan(), torch.ones(16, dtype=torch.bool))
    compare.equal("the others", got[[0, 2]].isnan(), torch.zeros(2, 16, dtype=torch.bool))


COUNT, REFUSED_SPEC = 5, SPECS["gpt-oss"]
PLAIN = weights_of(REFUSED_SPEC, 40, COUNT, torch.float32)
CODES = PLAIN | {n: PLAIN[n].to(torch.float8_e4m3fn) for n in ("experts.w13", "experts.w2")}
SHARE, IDS = share_of(9, 3), ids_of(9, 3, COUNT, dropped=False)


def _scales(across: int = 1, **how: Any) -> dict[str, Quantised]:
    return {part: Quantised(torch.ones(COUNT, down, across), **how) for part, down in (("w13", 2), ("w2", 1))}


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "float64": ({"x": torch.zeros(9, 40, dtype=torch.float64)}, ("float64",)),
    "mixed": ({"x": torch.zeros(9, 40, dtype=torch.float16)}, ("float16", "float32")),
    "narrow weights": ({"x": torch.zeros(9, 41)}, ("41", "2 F")),
    "no bias": ({"tensors": {n: t for n, t in PLAIN.items() if n != "experts.b2"}}, ("experts.b2",)),
    "ids of float": ({"ids": IDS.float()}, ("float32", "weights")),
    "more rows of ids": ({"ids": IDS.repeat(2, 1), "weights": SHARE.repeat(2, 1)}, ("[18, 3]", "9")),
    "another number of experts": ({"tensors": PLAIN | {"experts.w13": PLAIN["experts.w13"][:4]}}, ("4", "5")),
    "map of int64": ({"expert_map": torch.zeros(5, dtype=torch.int64)}, ("int64",)),
    "weights of another K": ({"weights": SHARE[:, :2]}, ("[9, 2]",)),
    "short bias": ({"tensors": PLAIN | {"experts.b13": PLAIN["experts.b13"][:, :-1]}}, ("73", "74")),
    "rows of x": ({"ids": IDS[:4], "weights": SHARE[:4]}, ("[4, 3]", "9")),
    "added": ({"added": torch.zeros(4, 40)}, ("[4, 40]",)),
    "not float8": ({"quantised": _scales()}, ("float8_e4m3fn",)),
    "scales": ({"tensors": CODES, "quantised": _scales() | {"w13": Quantised(SHARE[0])}}, ("[3]", "[5, 2, 1]")),
    "one scale for both": ({"tensors": CODES, "quantised": _scales(tile=(0, 0), stacked=False)}, ("[5, 1, 1]",)),
    "scales of 8 columns": ({"tensors": CODES, "quantised": _scales(5, tile=(128, 8))}, ("8", "16")),
    "interleaved float8": ({"tensors": CODES, "quantised": _scales(), "interleaved": True}, ("interleaved",)),
}


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Quantised):
        return replace(value, scale=value.scale.to(device))
    if isinstance(value, dict):
        return {name: _to(own, device) for name, own in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("what", REFUSED)
def test_experts_are_refused_in_words(device: str, what: str) -> None:
    changed, words = REFUSED[what]
    given = {"x": torch.zeros(9, 40), "spec": REFUSED_SPEC, "tensors": PLAIN, "ids": IDS, "weights": SHARE} | changed
    error = compare.refused(what, lambda: experts.routed_experts(**_to(given, device)), words)
    compare.same("error", type(error), InputError)


def test_a_row_too_few_is_refused(device: str) -> None:
    hidden, w2 = torch.zeros(26, REFUSED_SPEC.width, device=device), PLAIN["experts.w2"].to(device)
    dispatched = dispatched_of(IDS, COUNT, 16, True, device)
    compare.refused("call", lambda: grouped_matmul.down(hidden, w2, dispatched, TILES["one tile"]), ("26", "27"))
