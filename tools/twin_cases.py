"""One launch of each kernel for each dtype, on small inputs, against its twin in reference_impl: what twins.py runs.

Ids, slots, copies: equal. Sums: within the bound of what the kernel stores and rounds, as the oracle derives it. Widths
fill no tile, a third of the ids names no expert, and whatever must not be read is NaN. The adverse inputs are those of
tests/kernel_twins; here each kernel is compiled once for each way that its launcher takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import LayerSpec, LogitsSpec, MLPSpec, Routing, RoutingSpec
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poisoned_allocations
from moe_conformance.kernels import capture, combine, dispatch, experts, grouped_matmul, layer, padding, routing
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.kernels.grouped_kernel import Dispatched
from moe_conformance.kernels.tuning import choose
from moe_conformance.oracle.activation import activated
from moe_conformance.oracle.experts import experts_value
from moe_conformance.oracle.layer import layer_bound
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value
from moe_conformance.reference_impl import capture as reference_capture
from moe_conformance.reference_impl import combine as reference_combine
from moe_conformance.reference_impl import dispatch as reference_dispatch
from moe_conformance.reference_impl import experts as reference_experts
from moe_conformance.reference_impl import grouped_matmul as reference_grouped
from moe_conformance.reference_impl import layer as reference_layer
from moe_conformance.reference_impl import padding as reference_padding
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8

TOP_K, EXPERTS, HIDDEN, WIDTH = 4, 60, 72, 40
# Tokens on each path of the experts: pairs not sorted; sorted in one launch; counted first, being more than 4096.
PATHS = {"unsorted": 3, "sorted": 19, "counted": 1100}
METHODS = {
    "softmax": RoutingSpec(TOP_K, renormalize="sum", per_expert_scale=True),
    "groups": RoutingSpec(
        TOP_K, score="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="top2_sum",
        renormalize="sum", epsilon=1e-20, scale=2.5,
    ),
}  # fmt: skip
SPEC = MLPSpec(WIDTH, "gelu_tanh")
# float8 weights with a scale for each 16 x 32, which cuts blocks at the seam of gate and up.
TILE = (16, 32)
LAYER = LayerSpec(HIDDEN, EXPERTS, LogitsSpec(), RoutingSpec(TOP_K, renormalize="sum"), SPEC, output_scale=2.5)

Case = Callable[[], None]


def cases(kernel: str, dtype: str, device: str) -> Iterator[tuple[str, Case]]:
    """Names and checks of a kernel in one dtype, in order. A check raises Nonconformance for a wrong answer."""
    given: Any = (torch.bfloat16 if dtype == "float8 weights" else getattr(torch, dtype)), device
    fp8 = dtype == "float8 weights"
    match kernel:
        case "route":
            for name, method in METHODS.items():
                yield name, partial(route, method, *given)
        case "align":
            for name in ("sorted", "counted"):
                yield name, partial(align, PATHS[name], *given)
        case "gate_up" | "down":
            check = gate_up if kernel == "gate_up" else down
            for name in ("unsorted", "sorted"):
                yield name, partial(check, PATHS[name], fp8, *given)
        case "combine":
            yield "all options", partial(combined, *given)
        case "resize":
            yield "pad", partial(padded, *given)
            yield "unpad", partial(unpadded, *given)
        case "capture":
            for name, tokens in (("one launch", 9), ("two launches", 1500)):
                yield name, partial(captured, tokens, *given)
        case "experts":
            for name, tokens in PATHS.items():
                yield name, partial(routed_experts, tokens, fp8, *given)
        case "layer":
            for name, tokens in PATHS.items():
                yield name, partial(whole_layer, tokens, *given)
        case _:
            raise ValueError(f"kernel: got {kernel!r}, want one of twins.KERNELS")


def route(spec: RoutingSpec, dtype: torch.dtype, device: str) -> None:
    logits = distinct_logits(19, EXPERTS, "logits", dtype)
    tensors = {
        "router.selection_bias": normal((EXPERTS,), "bias", std=0.25),
        "router.per_expert_scale": (normal((EXPERTS,), "scale") + 1.5).to(dtype),
    }
    with poisoned_allocations():
        got = routing.route_logits(logits.to(device), spec, on(device, tensors))
    wide = exact(tensors)
    want = reference_routing.route_logits(logits.double(), spec, wide)
    compare.equal("ids", got.ids, want.ids)
    value, _ = weights_value(logits.double(), want.ids, spec, wide, dtype, None, stored=torch.float32)
    compare.close("weights", got.weights, want.weights, value.bound("roundings of float32"))


def align(tokens: int, dtype: torch.dtype, device: str) -> None:
    ids = ids_of(tokens)
    half = torch.full((EXPERTS,), -1, dtype=torch.int32)
    half[::2] = torch.arange(EXPERTS // 2, dtype=torch.int32).flip(0)
    for what, expert_map in (("no map", None), ("half of the experts", half)):
        given = None if expert_map is None else expert_map.to(device)
        with poisoned_allocations():
            got = dispatch.align(ids.to(dtype).to(device), EXPERTS, 16, given)
        want = reference_dispatch.align(known(ids), EXPERTS, 16, expert_map)
        for field, tensor in want._asdict().items():
            compare.equal(f"{what}: {field}", getattr(got, field), tensor)


def gate_up(tokens: int, fp8: bool, dtype: torch.dtype, device: str) -> None:
    weights, scales, wide = stored(dtype, fp8)
    x, ids = normal((tokens, HIDDEN), "x", dtype), ids_of(tokens)
    dispatched, tile = dispatched_of(x, ids, weights, device)
    w, scale = weights["experts.w13"].to(device), on(device, scales).get("w13")
    with poisoned_allocations():
        got = grouped_matmul.gate_up(x.to(device), w, SPEC, dispatched, tile.gate_up, quantised=scale).cpu()
    want = reference_grouped.gate_up(x.double(), wide["experts.w13"], SPEC, ids)
    for expert, rows in pairs_of(ids):
        both = Value.of(x[rows // TOP_K]).project(wide["experts.w13"][expert], torch.float32)
        value = activated(both[:, :WIDTH], both[:, WIDTH:], SPEC, Storage.stored(torch.float32)).stored(dtype)
        compare.close(f"expert {expert}", got[rows], want[rows], value.bound("one kernel"))
    compare.equal("rows of no expert", got[want[:, 0].isnan()], want[want[:, 0].isnan()])


def down(tokens: int, fp8: bool, dtype: torch.dtype, device: str) -> None:
    weights, scales, wide = stored(dtype, fp8)
    x, ids = normal((tokens, HIDDEN), "x", dtype), ids_of(tokens)
    hidden = normal((tokens * TOP_K, WIDTH), "hidden", dtype)
    hidden[(known(ids) < 0).flatten()] = torch.nan
    dispatched, tile = dispatched_of(x, ids, weights, device)
    w, scale = weights["experts.w2"].to(device), on(device, scales).get("w2")
    with poisoned_allocations():
        got = grouped_matmul.down(hidden.to(device), w, dispatched, tile.down, quantised=scale).cpu()
    want = reference_grouped.down(hidden.double(), wide["experts.w2"], ids)
    for expert, rows in pairs_of(ids):
        value = Value.of(hidden[rows]).project(wide["experts.w2"][expert], torch.float32).stored(dtype)
        compare.close(f"expert {expert}", got[rows], want[rows], value.bound("one kernel"))
    compare.equal("rows of no expert", got[want[:, 0].isnan()], want[want[:, 0].isnan()])


def combined(dtype: torch.dtype, device: str) -> None:
    """With identity experts, a scale and an addend; what belongs to no expert is NaN."""
    tokens, identity = 19, 3
    x, added = (normal((tokens, HIDDEN), name, dtype) for name in ("x", "added"))
    ids, weights = integers((tokens, TOP_K), "ids", EXPERTS + identity + 2, -1), weights_of(tokens)
    taken, passed = (ids >= 0) & (ids < EXPERTS), (ids >= EXPERTS) & (ids < EXPERTS + identity)
    outputs = normal((tokens * TOP_K, HIDDEN + 8), "outputs", dtype)
    outputs[:, HIDDEN:] = torch.nan
    outputs[~taken.flatten()] = torch.nan
    options = {"identity_experts": identity, "output_scale": 2.5}
    with poisoned_allocations():
        given = (tensor.to(device) for tensor in (outputs, ids, weights, x))
        got = combine.combine(*given, EXPERTS, added=added.to(device), **options)
    wide = (outputs.double(), ids, weights.double(), x.double())
    want = reference_combine.combine(*wide, EXPERTS, added=added.double(), **options)
    rows = outputs.unflatten(0, (tokens, TOP_K))[..., :HIDDEN].double().masked_fill(~taken[..., None], 0)
    terms = Value.of(weights.double().masked_fill(~taken, 0).T[..., None]) * Value.of(rows.transpose(0, 1))
    own = Value.of(weights.double().masked_fill(~passed, 0).T[..., None]).summed(torch.float32) * Value.of(x)
    total = terms.stored(torch.float32).summed(torch.float32) + own.stored(torch.float32)
    total = (total.stored(torch.float32) * Value.of(2.5)).stored(torch.float32) + Value.of(added)
    bound = total.stored(torch.float32).stored(dtype).bound("float32 sums, one rounding")
    compare.close("sum", got, want, bound)


def padded(dtype: torch.dtype, device: str) -> None:
    x = normal((19, HIDDEN - 1), "x", std=4.0).to(dtype)
    compare.equal("bits", bits(padding.pad(x.to(device), HIDDEN + 8)), bits(reference_padding.pad(x, HIDDEN + 8)))


def unpadded(dtype: torch.dtype, device: str) -> None:
    x = normal((19, HIDDEN), "x", std=4.0).to(dtype)
    compare.equal("bits", bits(padding.unpad(x.to(device), HIDDEN - 3)), bits(reference_padding.unpad(x, HIDDEN - 3)))


def captured(tokens: int, dtype: torch.dtype, device: str) -> None:
    """dtype: of the buffer. Ids of both dtypes, then one that is refused, which leaves the buffer as it was."""
    for ids_dtype in (torch.int32, torch.int64):
        for refused in (False, True):
            ids = integers((tokens, TOP_K), "ids", EXPERTS).to(ids_dtype)
            ids[5, 1] = EXPERTS if refused else 0
            found = []
            for call, place in ((capture.capture, device), (reference_capture.capture, "cpu")):
                buffer = torch.full((tokens, 3, TOP_K), 99, dtype=dtype, device=place)
                flags = torch.zeros(3, dtype=torch.int32, device=place)
                call(ids.to(place), 2, tokens - 3, buffer, 1, EXPERTS, flags)
                found.append((buffer, flags))
            what = f"{ids_dtype} ids" + ", one refused" * refused
            compare.equal(f"{what}: buffer", found[0][0], found[1][0])
            compare.equal(f"{what}: flags", found[0][1], found[1][1])


def routed_experts(tokens: int, fp8: bool, dtype: torch.dtype, device: str) -> None:
    weights, scales, wide = stored(dtype, fp8)
    x, ids, share = normal((tokens, HIDDEN), "x", dtype), ids_of(tokens), weights_of(tokens)
    given = [tensor.to(device) for tensor in (ids, share)]
    with poisoned_allocations():
        got = experts.routed_experts(
            x.to(device), SPEC, on(device, weights), *given, output_scale=2.5, quantised=on(device, scales)
        )
    ids = known(ids)
    want = reference_experts.routed_experts(x.double(), SPEC, wide, ids, share.double(), output_scale=2.5)
    value = experts_value(Value.of(x), SPEC, wide, ids, Value.of(share), Storage.stored(dtype))
    bound = (value * Value.of(2.5)).stored(torch.float32).stored(dtype).bound("float32 sums and stored tensors")
    compare.close("sum", got, want, bound)


def whole_layer(tokens: int, dtype: torch.dtype, device: str) -> None:
    """At the routing that it says it took, which in float32 must be the reference's own."""
    x = normal((tokens, HIDDEN), "x", dtype)
    tensors = {n: normal(s, n, dtype, 1.0 if len(s) == 1 else 0.125) for n, s in LAYER.tensors().items()}
    with poisoned_allocations():
        got = layer.layer(x.to(device), LAYER, on(device, tensors))
    wide, took = exact(tensors), Routing(got.ids.cpu().long(), got.weights.cpu().double())
    if dtype == torch.float32:
        compare.equal("ids", took.ids, reference_layer.layer(x.double(), LAYER, wide).ids)
    want = reference_layer.layer(x.double(), LAYER, wide, routing=took).output
    bound = layer_bound(x, LAYER, tensors, *took, Storage.stored(dtype))
    compare.close("output", got.output, want, bound)


def on(device: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: Quantised(own.scale.to(device), own.tile) if isinstance(own, Quantised) else own.to(device)
        for name, own in tensors.items()
    }


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


def ids_of(tokens: int) -> Tensor:
    """[T, K] int64, different experts in a row; a third of the pairs names no expert."""
    ids = distinct_logits(tokens, EXPERTS, "order").topk(TOP_K).indices
    outside = torch.tensor([-1, EXPERTS + 3, 2**31 - 1])[integers((tokens, TOP_K), "outside", 3)]
    return torch.where(integers((tokens, TOP_K), "gone", 3) == 0, outside, ids)


def known(ids: Tensor) -> Tensor:
    """The same pairs as the reference takes them: -1 for no expert."""
    return ids.where((ids >= 0) & (ids < EXPERTS), -1)


def pairs_of(ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    for expert in known(ids).unique().tolist():
        if expert >= 0:
            yield expert, (ids.flatten() == expert).nonzero().flatten()


def weights_of(tokens: int) -> Tensor:
    """float32 weights that 16 bits do not hold."""
    return integers((tokens, TOP_K), "weights", 16, low=1).float() / 7


def stored(dtype: torch.dtype, fp8: bool) -> tuple[dict[str, Tensor], dict[str, Quantised], dict[str, Tensor]]:
    """Weights of the experts as kernels read them, their scales, and what they are in float64."""
    shapes = SPEC.tensors("experts", HIDDEN, (EXPERTS,))
    plain = {name: normal(shape, name, torch.float32 if fp8 else dtype, 0.25) for name, shape in shapes.items()}
    if not fp8:
        return plain, {}, exact(plain)
    codes, scales, wide = {}, {}, {}
    for name, tensor in plain.items():
        halves = 2 if name == "experts.w13" else 1
        codes[name], scale = quantise_fp8(tensor, tile=TILE, stacked=halves)
        wide[name] = dequantise_fp8(codes[name], scale, tile=TILE, stacked=halves, dtype=torch.float64)
        scales[name.removeprefix("experts.")] = Quantised(scale, TILE)
    return codes, scales, wide


def dispatched_of(x: Tensor, ids: Tensor, weights: dict[str, Tensor], device: str) -> tuple[Dispatched, Any]:
    """Pairs as `routed_experts` dispatches them, and the tiles that it takes."""
    config = choose(experts.problem_of(x, SPEC, weights["experts.w2"], TOP_K, EXPERTS), torch.device(device))
    ids = ids.to(device)
    aligned = dispatch.align(ids, EXPERTS, config.block_m) if config.aligned else None
    return Dispatched(ids, EXPERTS, config.block_m, aligned), config
