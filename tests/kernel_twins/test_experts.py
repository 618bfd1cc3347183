"""Both projections, pair by pair and summed, within the bound of float32 sums and one rounding a stored tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

from moe_conformance.errors import InputError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal, poison_, poisoned_allocations
from moe_conformance.kernels import experts, grouped_matmul
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.grouped_matmul import Dispatched, Quantised
from moe_conformance.kernels.tuning import Config, Tile
from moe_conformance.model.specs import MLPSpec
from moe_conformance.oracle.layer import activated
from moe_conformance.oracle.tolerance import Contract, Value
from moe_conformance.reference_impl import grouped_matmul as reference_grouped
from moe_conformance.reference_impl.parallel.experts import experts_part


def _inside(spec: MLPSpec, x: Tensor, w: Tensor, bias: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Value:
    """What enters w2 for rows x [n, D] of one expert, with the spread of a kernel that stores it in dtype."""
    both = Value.of(x).project(w, torch.float32)
    if spec.weight_on == "input":
        both = (both * Value.of(weight)).stored(torch.float32)
    if bias is not None:
        both = (both + Value.of(bias)).stored(torch.float32)
    gate, up = (both[:, : spec.width], both[:, spec.width :]) if spec.gated else (both, None)
    inner = activated(gate, up, spec, Contract.stored(torch.float32))
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


def test_gate_up_is_the_reference(device: str) -> None:
    top_k, count, hidden = 3, 5, 40
    for index, (name, spec) in enumerate(SPECS.items()):
        for way, (tokens, tile, sort) in enumerate(WAYS):
            dtype = DTYPES[(index + way) % 3]
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
            _same_gate_up(f"{name}, {dtype}, {tile}", got, x, w, bias, spec, ids, share)


def test_activations_of_exact_inputs_are_the_reference(device: str) -> None:
    """Products of one term, so that gate and up are what the case says: tiny, large, around a clamp, infinite."""
    values = torch.tensor(
        [
            0.0,
            2.0**-30,
            -(2.0**-12),
            0.01,
            -0.25,
            0.25,
            LIMIT,
            -LIMIT,
            0.7421875,
            1.5,
            -3.0,
            8.0,
            -9.0,
            20.0,
            -40.0,
            95.0,
        ]
    )
    width = len(values)
    gates = torch.cat([values, -values, values / 3])
    for name, spec in SPECS.items():
        spec = replace(spec, width=width, bias=False, weight_on="output")
        for up in (torch.ones(width), values.flip(0)):
            # Expert 0 computes gate = x0 values; x is one column that matters and 15 of zeros.
            rows = torch.cat([values, up]) if spec.gated else values
            w = torch.zeros(1, len(rows), 16)
            w[0, :, 0] = rows
            x = torch.zeros(len(gates), 16)
            x[:, 0] = gates
            ids = torch.zeros(len(gates), 1, dtype=torch.int64)
            got = grouped_matmul.gate_up(
                x.to(device), w.to(device), spec, dispatched_of(ids, 1, 16, True, device), TILES["one tile"]
            )
            _same_gate_up(name, got, x, w, None, spec, ids, torch.ones(len(gates), 1))


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


def test_down_is_the_reference(device: str) -> None:
    top_k, count, hidden, width = 3, 5, 40, 37
    for dtype in DTYPES:
        for tokens, tile, sort in WAYS:
            ids = ids_of(tokens, top_k, count, dropped=True)
            rows = normal((tokens * top_k, width), "rows", dtype)
            w, bias = normal((count, hidden, width), "w2", dtype, 0.25), normal((count, hidden), "b2", dtype)
            # What stands in the row of a pair without an expert is poison, as gate_up leaves it.
            rows[~((ids >= 0) & (ids < count)).flatten()] = float("nan")
            for own in (None, bias):
                with poisoned_allocations():
                    got = grouped_matmul.down(
                        rows.to(device),
                        w.to(device),
                        dispatched_of(ids, count, 16, sort, device),
                        TILES[tile],
                        bias=None if own is None else own.to(device),
                    ).cpu()
                exact = None if own is None else own.double()
                want = reference_grouped.down(rows.double(), w.double(), ids, bias=exact)
                for expert in range(count):
                    at = (ids.flatten() == expert).nonzero().flatten()
                    value = Value.of(rows[at]).project(w[expert], torch.float32)
                    value = value if own is None else (value + Value.of(own[expert])).stored(torch.float32)
                    bound = value.stored(dtype).bound("one kernel")
                    compare.close(f"{dtype}, {tile}, expert {expert}", got[at], want[at], bound)
                nobody = ~((ids >= 0) & (ids < count)).flatten()
                compare.equal(f"{dtype}, {tile}: rows of no expert", got[nobody], want[nobody])


def test_the_routed_sum_is_the_reference(device: str) -> None:
    """Few pairs and many, none, of all specs and dtypes, with identity experts and what is always on."""
    hidden, count = 40, 11
    for index, (name, spec) in enumerate(SPECS.items()):
        for tokens, top_k in ((1, 2), (7, 3), (67, 8), (0, 3)):
            dtype = DTYPES[(index + tokens) % 3]
            tensors, x = weights_of(spec, hidden, count, dtype), normal((tokens, hidden), "x", dtype)
            added = normal((tokens, hidden), "added", dtype)
            ids, share = ids_of(tokens, top_k, count, dropped=True), share_of(tokens, top_k)
            ids = ids.where(ids != 3, count + 1)
            on = {n: t.to(device) for n, t in tensors.items()}
            turned = [t.to(device).T.contiguous().T for t in (ids, share)]
            for identity, scale, also in ((0, 1.0, None), (3, 2.5, added)):
                with poisoned_allocations():
                    got = experts.routed_experts(
                        x.to(device),
                        spec,
                        on,
                        *turned,
                        identity_experts=identity,
                        scale=scale,
                        added=None if also is None else also.to(device),
                    )
                what = f"{name}, {dtype}, {tokens} tokens, {identity} identity experts"
                same_sum(what, got, x, spec, tensors, ids, share, identity=identity, scale=scale, added=also)


def test_an_output_norm_stands_before_the_weight(device: str) -> None:
    spec = MLPSpec(37, output_norm=0.125)
    tensors, x = weights_of(spec, 40, 5, torch.float32), normal((9, 40), "x")
    ids, share = ids_of(9, 3, 5, dropped=True), share_of(9, 3)
    on = {n: t.to(device) for n, t in tensors.items()}
    with poisoned_allocations():
        got = experts.routed_experts(x.to(device), spec, on, ids.to(device), share.to(device))
    same_sum("output norm", got, x, spec, tensors, ids, share)


def test_a_rank_adds_its_own_experts_alone(device: str) -> None:
    """With a map, few pairs and many; the weights of other ranks' pairs are NaN."""
    spec, count = SPECS["gpt-oss"], 11
    expert_map = torch.full((count,), -1, dtype=torch.int32)
    expert_map[torch.tensor([7, 0, 10, 3])] = torch.arange(4, dtype=torch.int32)
    tensors = weights_of(spec, 40, 4, torch.float32)
    on = {n: t.to(device) for n, t in tensors.items()}
    for tokens, top_k in ((1, 2), (23, 3)):
        x, ids = normal((tokens, 40), "x"), ids_of(tokens, top_k, count, dropped=False)
        share = share_of(tokens, top_k).masked_fill(expert_map[ids] < 0, float("nan"))
        with poisoned_allocations():
            got = experts.experts_part(x.to(device), ids.to(device), share.to(device), spec, on, expert_map.to(device))
        local = torch.where(expert_map[ids] < 0, 4, expert_map[ids].long())
        same_sum(f"{tokens} tokens", got, x, spec, tensors, local, share.nan_to_num())
        part = experts_part(
            x.double(), ids, share.nan_to_num().double(), spec, {n: t.double() for n, t in tensors.items()}, expert_map
        )
        compare.same("the reference's part is near", bool((part - got.cpu()).abs().max() < 1e-4), True)


def test_padded_widths_are_cut_by_masks(device: str) -> None:
    """Weights as a load pads them: NaN behind the true hidden dim, zeros behind the true intermediate one."""
    hidden, padded, wide = 40, 48, 64
    normed = {"output norm": MLPSpec(37, output_norm=0.125)}
    for name, spec in ({name: SPECS[name] for name in ("silu", "gpt-oss", "relu2, no gate")} | normed).items():
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
        same_sum(name, got, x, spec, tensors, ids, share)


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


def test_offsets_of_experts_do_not_wrap(device: str) -> None:
    """Experts, their rows and those of x 2^30 elements apart, the third beyond 2^31: strides have 32 bits, offsets 64.

    Memory in between is never touched.
    """
    far = 2**30 + 16
    room = torch.empty(2 * far + 16 * 16, dtype=torch.float16, device=device)
    for what, shape, strides in (("experts", (3, 16, 16), (far, 16, 1)), ("rows", (1, 3, 16), (16, far, 1))):
        w = room.as_strided(shape, strides)
        w.copy_(normal(shape, what, torch.float16))
        x = torch.empty(2 * far + 16, dtype=torch.float16, device=device).as_strided((3, 16), (far, 1))
        x.copy_(normal((3, 16), "x", torch.float16))
        ids = torch.full((3, 1), shape[0] - 1)
        got = grouped_matmul.down(x, w, dispatched_of(ids, shape[0], 16, True, device), TILES["one tile"])
        value = Value.of(x.cpu()).project(w[-1].cpu(), torch.float32).stored(torch.float16)
        compare.close(f"far {what}", got, value.exact, value.bound("one kernel"))


def test_offsets_of_columns_do_not_wrap(device: str) -> None:
    """Columns of x, and of w, so far apart that the last of a step lies beyond 2^31 elements."""
    far = 2**27 + 2**24
    near_x, near_w = normal((3, 16), "x", torch.float16), normal((2, 16, 16), "w", torch.float16)
    room = torch.empty(15 * far + 512, dtype=torch.float16, device=device)
    for what in ("x", "w"):
        x, w = near_x.to(device), near_w.to(device)
        if what == "x":
            x = room.as_strided((3, 16), (1, far)).copy_(near_x)
        else:
            w = room.as_strided((2, 16, 16), (16, 1, far)).copy_(near_w)
        dispatched = dispatched_of(torch.ones(3, 1, dtype=torch.int64), 2, 16, True, device)
        got = grouped_matmul.down(x, w, dispatched, TILES["one tile"])
        value = Value.of(near_x).project(near_w[1], torch.float32).stored(torch.float16)
        compare.close(f"far columns of {what}", got, value.exact, value.bound("one kernel"))


def test_a_map_never_leads_beyond_the_weights(device: str) -> None:
    """A local id that no expert has is nobody's: its rows are not written, and nothing behind the weights is read."""
    w, x = normal((2, 16, 16), "w"), normal((3, 16), "x")
    ids, expert_map = torch.tensor([[0], [1], [2]]), torch.tensor([1, 2, 0], dtype=torch.int32)
    for sort in (True, False):
        on = (ids.to(device), 3, 16), expert_map.to(device)
        aligned = align(on[0][0], 3, 16, on[1]) if sort else None
        with poisoned_allocations():
            got = grouped_matmul.down(x.to(device), w.to(device), Dispatched(*on[0], aligned, on[1]), TILES["one tile"])
        compare.equal("the pair of local expert 2 of 2", got[1].isnan(), torch.ones(16, dtype=torch.bool))
        compare.equal("the others", got[[0, 2]].isnan(), torch.zeros(2, 16, dtype=torch.bool))


def test_experts_are_refused_in_words(device: str) -> None:
    spec, count = SPECS["gpt-oss"], 5
    tensors = {n: t.to(device) for n, t in weights_of(spec, 40, count, torch.float32).items()}
    x, ids = normal((9, 40), "x").to(device), ids_of(9, 3, count, dropped=False).to(device)
    share = share_of(9, 3).to(device)

    def call(**changed: Any) -> None:
        given = {"x": x, "spec": spec, "tensors": tensors, "ids": ids, "weights": share} | changed
        experts.routed_experts(**given)

    eight = {
        "w13": Quantised(torch.ones(count, 2, 1, device=device)),
        "w2": Quantised(torch.ones(count, 1, 1, device=device)),
    }
    codes = tensors | {n: tensors[n].to(torch.float8_e4m3fn) for n in ("experts.w13", "experts.w2")}
    small = {"w13": Quantised(torch.ones(count, 2, 5, device=device), (128, 8))}
    small["w2"] = Quantised(torch.ones(count, 1, 5, device=device), (128, 8))
    without = {n: t for n, t in tensors.items() if n != "experts.b2"}
    for what, changed, words in (
        ("float64", {"x": x.double()}, ("float64",)),
        ("mixed", {"x": x.half()}, ("float16", "float32")),
        ("narrow weights", {"x": normal((9, 41), "x").to(device)}, ("41", "2 F")),
        ("no bias", {"tensors": without}, ("experts.b2",)),
        ("ids of float", {"ids": ids.float()}, ("float32", "weights")),
        ("more rows of ids", {"ids": ids.repeat(2, 1), "weights": share.repeat(2, 1)}, ("[18, 3]", "9")),
        ("another number of experts", {"tensors": tensors | {"experts.w13": tensors["experts.w13"][:4]}}, ("4", "5")),
        ("map of int64", {"expert_map": torch.zeros(5, dtype=torch.int64, device=device)}, ("int64",)),
        ("weights of another K", {"weights": share[:, :2]}, ("[9, 2]",)),
        ("short bias", {"tensors": tensors | {"experts.b13": tensors["experts.b13"][:, :-1]}}, ("73", "74")),
        ("rows of x", {"ids": ids[:4], "weights": share[:4]}, ("[4, 3]", "9")),
        ("added", {"added": x[:4]}, ("[4, 40]",)),
        ("not float8", {"quantised": eight}, ("float8_e4m3fn",)),
        ("scales", {"tensors": codes, "quantised": eight | {"w13": Quantised(share[0])}}, ("[3]", "[5, 2, 1]")),
        ("two tiles", {"tensors": codes, "quantised": eight | {"w2": replace(eight["w2"], tile=(1, 0))}}, ("(1, 0)",)),
        ("scales of 8 columns", {"tensors": codes, "quantised": small}, ("8", "16")),
        ("interleaved float8", {"tensors": codes, "quantised": eight, "interleaved": True}, ("interleaved",)),
    ):  # fmt: skip
        error = compare.refused(what, lambda c=changed: call(**c), words)
        compare.same(f"{what}: error", type(error), InputError)
    hidden = torch.zeros(26, spec.width, device=device)
    dispatched = dispatched_of(ids, count, 16, True, device)
    compare.refused(
        "a row too few",
        lambda: grouped_matmul.down(hidden, tensors["experts.w2"], dispatched, TILES["one tile"]),
        ("26", "27"),
    )
