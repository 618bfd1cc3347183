"""What the derived tolerances let pass and what they catch: correct MoE layers, layers with a planted fault, and ids.

    python benchmarks/tolerance.py [--full] [--hidden H --intermediate F --experts E --top-k K --tokens T --trials N]

Prints Markdown. An entry is the largest error over its bound: of correct paths the worst trial, which must stay below
1; of faults the mildest, which is caught above 1. --full takes H 2816, F 704 and 12 trials.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py; must stand before torch is imported

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.oracle.activation import activated
from moe_conformance.oracle.bounds import rms_ratio
from moe_conformance.oracle.choice import accepted
from moe_conformance.oracle.layer import layer_value
from moe_conformance.oracle.precision import LAMBDA, unit_roundoff
from moe_conformance.oracle.scores import compared_value
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value

LOW = (torch.bfloat16, torch.float16)
ALL = (*LOW, torch.float32)
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Layer:
    """x [T, H], w13 [E, 2F, H] and w2 [E, H, F] in one dtype; ids and weights [T, K], weights in float32."""

    spec: LayerSpec
    x: Tensor
    tensors: dict[str, Tensor]
    ids: Tensor
    weights: Tensor
    scores: Tensor  # softmax over all experts, not renormalised


def build(args: argparse.Namespace, dtype: torch.dtype, trial: int) -> Layer:
    """Gaussian x and logits; Gaussian weights over the root of what they sum over, so that gate and up are about 1."""
    spec = LayerSpec(
        args.hidden,
        args.experts,
        LogitsSpec(),
        RoutingSpec(args.top_k, renormalize="sum"),
        MLPSpec(args.intermediate, "gelu_tanh"),
    )
    random = torch.Generator().manual_seed(trial)
    tensors = {
        name: torch.randn(shape, generator=random).mul_(shape[-1] ** -0.5).to(dtype)
        for name, shape in spec.tensors().items()
        if name.startswith("experts")
    }
    x = torch.randn(args.tokens, args.hidden, generator=random).to(dtype)
    scores = torch.randn(args.tokens, args.experts, generator=random).mul_(2).softmax(-1)
    weights, ids = scores.topk(args.top_k)
    return Layer(spec, x, tensors, ids, weights / weights.sum(-1, keepdim=True), scores)


# The paths under test. A linear takes (x [n, in], weight [out, in]) and returns [n, out] in x's dtype.


def split_k(x: Tensor, weight: Tensor, block: int = 64) -> Tensor:
    """Blocks of products summed in float32, even and odd blocks apart, as a split-K kernel does."""
    parts = zip(x.float().split(block, 1), weight.float().split(block, 1), strict=True)
    halves = [torch.zeros(len(x), len(weight)) for _ in range(2)]
    for index, (a, b) in enumerate(parts):
        halves[index % 2] += a @ b.T
    return (halves[0] + halves[1]).to(x.dtype)


def narrow_accumulator(x: Tensor, weight: Tensor, block: int = 16) -> Tensor:
    """Each block exact enough, but the running sum kept in x's dtype; 16 is the K of one tensor-core instruction."""
    total = x.new_zeros(len(x), len(weight))
    for a, b in zip(x.float().split(block, 1), weight.float().split(block, 1), strict=True):
        total = (total + a @ b.T).to(x.dtype)
    return total


def tf32(x: Tensor, weight: Tensor) -> Tensor:
    """Factors cut to the 10 bits of TF32, rounded to nearest."""
    a, b = (((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (x, weight))
    return F.linear(a, b)


def without_last(count: int, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x[:, :-count], weight[:, :-count])


def run(
    layer: Layer,
    first: Callable[[Tensor, Tensor], Tensor] = F.linear,
    second: Callable[[Tensor, Tensor], Tensor] = F.linear,
    gelu: str = "tanh",
    narrow_sum: bool = False,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The layer's output, correct in x's dtype unless an argument says otherwise."""
    ids = layer.ids if ids is None else ids
    weights = layer.weights if weights is None else weights
    total = torch.zeros_like(layer.x, dtype=layer.x.dtype if narrow_sum else torch.float32)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = first(layer.x[token], layer.tensors["experts.w13"][expert]).chunk(2, dim=-1)
        output = second(F.gelu(gate, approximate=gelu) * up, layer.tensors["experts.w2"][expert])
        total.index_add_(0, token, (output * weights[token, slot, None]).to(total.dtype))
    return total.to(layer.x.dtype)


def one_wrong_expert(layer: Layer) -> Tensor:
    ids = layer.ids.clone()
    ids[0, -1] = next(e for e in range(layer.spec.num_experts) if e not in ids[0].tolist())
    return run(layer, ids=ids)


def not_renormalised(layer: Layer) -> Tensor:
    return run(layer, weights=layer.scores.gather(1, layer.ids))


SAME_DTYPE = "torch, same dtype"
CORRECT: dict[str, Callable[[Layer], Tensor]] = {
    "fp32 accumulation, blocked, split-K": partial(run, first=split_k, second=split_k),
    SAME_DTYPE: run,
    "combine in the dtype (eager transformers)": partial(run, narrow_sum=True),
}
FAULTS: dict[str, Callable[[Layer], Tensor]] = {
    "gelu erf for tanh": partial(run, gelu="none"),
    "accumulator in the dtype, both GEMMs": partial(run, first=narrow_accumulator, second=narrow_accumulator),
    "factors in TF32": partial(run, first=tf32, second=tf32),
    "last 16 of K skipped in the first GEMM": partial(run, first=partial(without_last, 16)),
    "last block (64) skipped in the first GEMM": partial(run, first=partial(without_last, 64)),
    "one wrong expert for one token": one_wrong_expert,
    "no renormalisation": not_renormalised,
}


def applies(name: str, dtype: torch.dtype) -> bool:
    """An accumulator in float32 is correct, and only float32 factors can be cut to TF32."""
    return ("accumulator" not in name or dtype in LOW) and ("TF32" not in name or dtype == torch.float32)


def worst_case(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The deterministic bound, for the same storage: gamma_n for each sum, all errors of one sign."""

    def gamma(n: int, precision: torch.dtype = torch.float32) -> float:
        return n * unit_roundoff(precision) / (1 - n * unit_roundoff(precision))

    u, limit = unit_roundoff(dtype), torch.zeros(layer.x.shape, dtype=torch.float64)
    size = torch.zeros_like(limit)
    for expert in layer.ids.unique().tolist():
        token, slot = (layer.ids == expert).nonzero(as_tuple=True)
        x, w = layer.x[token].double(), layer.weights[token, slot, None].double()
        w13, w2 = (layer.tensors[f"experts.{name}"][expert].double() for name in ("w13", "w2"))
        hidden = x @ w13.T
        gate, up = hidden.chunk(2, dim=-1)
        gate_error, up_error = (gamma(x.shape[1]) * (x.abs() @ w13.abs().T) + u * hidden.abs()).chunk(2, dim=-1)
        act = F.gelu(gate, approximate="tanh")
        act_error = 1.13 * gate_error + gamma(8) * (gate.abs() + act.abs()) + u * act.abs()  # |gelu'| <= 1.13
        inner = act * up
        inner_error = up.abs() * act_error + act.abs() * up_error + u * inner.abs()
        output, total = (inner @ w2.T).abs(), inner.abs() @ w2.abs().T
        error = inner_error @ w2.abs().T + gamma(w2.shape[1]) * total + u * output
        limit.index_add_(0, token, w * (error + 2 * u * output))  # the weight and the product are stored
        size.index_add_(0, token, w * output)
    return limit + gamma(layer.ids.shape[1], dtype) * size


def layer_tables(args: argparse.Namespace) -> Iterator[str]:
    """One table a dtype, and what the policy is worth."""
    for dtype in ALL:
        found: dict[str, list[list[float]]] = {}
        unstored = []
        for trial in range(args.trials):
            layer = build(args, dtype, trial)
            value = partial(layer_value, layer.x, layer.spec, layer.tensors, layer.ids, layer.weights)
            stored = value(Storage.stored(dtype))
            fused = value(Storage.fused(dtype))
            limits = [worst_case(layer, dtype), stored.limit, fused.limit]
            peer = run(layer)
            peer_error = (peer.double() - stored.exact).abs()
            for name, path in (CORRECT | FAULTS).items():
                if applies(name, dtype):
                    got = path(layer)
                    error = (got.double() - stored.exact).abs()
                    ratios = [float((error / limit).max()) for limit in limits]
                    ratios += [float(error.max() / peer_error.max()), rms_ratio(got, peer, stored.exact)]
                    found.setdefault(name, []).append(ratios)
            narrow = value(replace(Storage.fused(dtype), hidden=torch.float32))
            unstored.append(float((peer_error / (narrow.limit)).max()))
        yield f"### {SHORT[dtype]}: largest error over bound"
        yield (
            "| path | deterministic | probabilistic, all stored | probabilistic, fused | max error vs torch | "
            "rms vs torch |\n|---|---|---|---|---|---|"
        )
        for name, trials in found.items():
            pick = max if name in CORRECT else min
            cells = " | ".join(f"{pick(column):.3g}" for column in zip(*trials, strict=True))
            yield f"| {'' if name in CORRECT else 'fault: '}{name} | {cells} |"
        if dtype in LOW:
            yield (
                f"\nWithout the store of gate and up in the fused policy, {SAME_DTYPE} is at "
                f"{max(unstored):.3g} of the bound.\n"
            )


def unit_table(args: argparse.Namespace) -> Iterator[str]:
    """Single stages on exact inputs."""
    yield "### Single stages, exact inputs: largest error over bound\n"
    yield "| stage | path | bf16 | fp16 | fp32 |\n|---|---|---|---|---|"
    spec = MLPSpec(1, "gelu_tanh", gated=False)
    rows: dict[str, list[float]] = {"tanh": [], "none": []}
    for dtype in ALL:
        gate = (torch.randn(args.tokens * 1024, 1, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
        value = activated(Value.of(gate), None, spec, Storage.stored(dtype))
        for form, row in rows.items():
            row.append(float(((F.gelu(gate, approximate=form).double() - value.exact).abs() / value.limit).max()))
    for form, row in rows.items():
        what = "correct" if form == "tanh" else "fault: gelu erf for tanh"
        yield f"| activation | {what} | " + " | ".join(f"{r:.3g}" for r in row) + " |"
    for what, ratio in routing_rows(args):
        yield f"| {what} | | | {ratio:.3g} |"


def routing_rows(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(1024, args.experts, generator=random) * 3
    scores = logits.softmax(-1)
    weights, ids = scores.topk(args.top_k)
    softmax = RoutingSpec(args.top_k, renormalize="sum")
    value = weights_value(logits, ids, softmax, {}, torch.float32)[0]
    for what, got in (("correct", weights / weights.sum(-1, keepdim=True)), ("fault: no renormalisation", weights)):
        yield f"softmax weights | {what}", float(((got - value.exact).abs() / value.limit).max())
    spec = RoutingSpec(args.top_k, score="sigmoid", selection_bias=True, renormalize="sum")
    bias = torch.randn(args.experts, generator=random) * 0.25
    biased = logits.sigmoid() + bias
    ids = biased.topk(args.top_k).indices
    value = weights_value(logits, ids, spec, {"router.selection_bias": bias}, torch.float32)[0]
    for what, scores in (("correct", logits.sigmoid()), ("fault: bias in the weights", biased)):
        got = scores.gather(1, ids)
        error = (got / got.sum(-1, keepdim=True) - value.exact).abs()
        yield f"sigmoid weights | {what}", float((error / (value.limit)).max())


def id_table(args: argparse.Namespace) -> Iterator[str]:
    """Sets of experts from logits that a router computes from x in float32, and from the same rounded to bf16."""
    yield f"### Expert sets, {args.routed_tokens} tokens a row, H {args.hidden}, softmax of logits from a projection\n"
    yield (
        "| E, K | logits | flipped sets | of those accepted | accepted in all | k/k+1 swaps accepted: derived D | "
        "5 u(l) in D | deterministic D | exact ties at k |\n|---|---|---|---|---|---|---|---|---|"
    )
    for experts, top_k in ((16, 4), (64, 8), (128, 8)):
        random = torch.Generator().manual_seed(experts)
        x = torch.randn(args.routed_tokens, args.hidden, generator=random).bfloat16()
        proj = (torch.randn(experts, args.hidden, generator=random) * args.hidden**-0.5).bfloat16()
        in_float32 = F.linear(x.float(), proj.float())
        exact = Value.of(x).project(proj, torch.float32)
        best = exact.exact.sort(-1, descending=True).indices
        swapped = torch.cat([best[:, : top_k - 1], best[:, [top_k]]], dim=-1)
        magnitude = x.double().abs() @ proj.double().abs().T
        surely = Value(exact.exact, torch.full_like(magnitude, torch.inf), torch.zeros_like(magnitude))
        surely = surely.erring(magnitude, args.hidden, torch.float32)
        for logits in (in_float32, in_float32.bfloat16()):
            derived = exact.stored(logits.dtype)
            ids = logits.float().topk(top_k).indices
            flipped = (ids.sort(-1).values != best[:, :top_k].sort(-1).values).any(-1)
            fine = passes(ids, derived, top_k)
            shares = [share(flipped), share(fine[flipped]), share(fine)]
            for how in (derived, Value(derived.exact, derived.spread), surely.stored(logits.dtype)):
                shares.append(share(passes(swapped, how, top_k)))
            top = logits.float().sort(-1, descending=True).values
            shares.append(share(top[:, top_k - 1] == top[:, top_k]))
            yield f"| {experts}, {top_k} | {SHORT[logits.dtype]} | " + " | ".join(shares) + " |"
    tied = torch.zeros(1, 16).topk(4).indices.tolist()[0]
    yield f"\ntorch.topk of 16 equal values, k 4: {tied}."


def passes(ids: Tensor, logits: Value, top_k: int) -> Tensor:
    spec = RoutingSpec(top_k)
    return accepted(ids, compared_value(logits, spec, {}, torch.float32), spec)


def share(mask: Tensor) -> str:
    return f"{mask.double().mean().item():.2%}" if mask.numel() else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the derived tolerances let pass and what they catch.")
    parser.add_argument("--full", action="store_true", help="H 2816, F 704, 12 trials, 48000 routed tokens: minutes")
    full = "--full" in sys.argv
    sizes: dict[str, Any] = {
        "hidden": 2816 if full else 512,
        "intermediate": 704 if full else 256,
        "experts": 16,
        "top-k": 4,
        "tokens": 32,
        "trials": 12 if full else 4,
        "routed-tokens": 48000 if full else 8000,
    }
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    began = time.perf_counter()
    print(f"`python benchmarks/tolerance.py {shlex.join(sys.argv[1:])}`".replace(" `", "`"))
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads; "
        f"H {args.hidden}, F {args.intermediate}, E {args.experts}, K {args.top_k}, T {args.tokens}, "
        f"{args.trials} trials, lambda {LAMBDA:g}\n"
    )
    with torch.no_grad():
        for part in (layer_tables, unit_table, id_table):
            for line in part(args):
                print(line, flush=True)
            print()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
