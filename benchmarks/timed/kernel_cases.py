"""The kernels that are timed, and how an answer is judged before its time counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_inputs import Batch
from model_shapes import Model, Weights
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import Aligned
from moe_conformance.kernels.capture import capture
from moe_conformance.kernels.combine import combine
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.experts import routed_experts
from moe_conformance.kernels.grouped_matmul import down, gate_up
from moe_conformance.kernels.layer import layer
from moe_conformance.kernels.padding import pad, unpad
from moe_conformance.kernels.routing import route_logits
from moe_conformance.kernels.tuning import Tile
from moe_conformance.reference_impl import experts as reference_experts
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.reference_impl.router import router_logits

# In order of importance, as rows are timed. "logits" is the router's product, torch's own: a part of a layer's time.
KERNELS = ("experts", "gate_up", "down", "route", "align", "layer", "combine", "capture", "logits", "pad", "unpad")

# Tokens that are compared with float64: the first, the last and some between.
COMPARED = 4
# A correct answer's distance from the exact one, of its length: each element went through at most five roundings to
# bfloat16 (gate and up, activated, expert output, weighted, sum), each below u of it. A wrong expert, weight or block
# is off by a quarter and more.
ROUNDINGS = 8
# Of a routing weight in float32: exp's argument and the sum over experts, as in `tolerance.softmax_weights`.
ROUTING_ROUNDINGS = 64


def applies(kernel: str, model: Model) -> bool:
    """Whether the row would say anything of this model."""
    return bool(model.padded) or kernel not in ("pad", "unpad")


def ours(kernel: str, model: Model, weights: Weights) -> Callable[[Batch], Any]:
    """The kernel as a function of its inputs."""
    tensors = weights.tensors
    run_gate_up, run_down = (product(name, model, weights) for name in ("gate_up", "down"))

    def run_capture(batch: Batch) -> Tensor:
        capture(batch.ids, 0, len(batch.ids), batch.buffer, 1, model.experts, batch.rejected)
        return batch.buffer

    storage = {"quantised": weights.scales, "interleaved": model.interleaved}

    runs: dict[str, Callable[[Batch], Any]] = {
        "route": lambda batch: route_logits(batch.logits, model.routing, tensors)[:2],
        "align": lambda batch: align(batch.ids, model.experts, batch.config.block_m),
        "gate_up": lambda batch: run_gate_up(batch, batch.config.gate_up),
        "down": lambda batch: run_down(batch, batch.config.down),
        "combine": lambda batch: combine(batch.outputs, batch.ids, batch.weights, batch.x, model.experts),
        "capture": run_capture,
        "pad": lambda batch: pad(batch.x, model.padded),
        "unpad": lambda batch: unpad(batch.wide, model.hidden),
        "experts": lambda batch: routed_experts(batch.x, model.mlp, tensors, batch.ids, batch.weights, **storage),
        "logits": lambda batch: router_logits(batch.x, model.layer.logits, tensors)[0],
        "layer": lambda batch: layer(batch.x, model.layer, tensors, **storage)[:3],
    }
    return runs[kernel]


def product(kernel: str, model: Model, weights: Weights) -> Callable[[Batch, Tile], Tensor]:
    """One of the two projections with a tile of the caller's choice."""
    tensors, scales = weights.tensors, weights.scales
    if kernel == "down":
        w2, b2, second = tensors["experts.w2"], tensors.get("experts.b2"), scales.get("w2")
        return lambda batch, tile: down(batch.hidden, w2, batch.dispatched, tile, bias=b2, quantised=second)
    w1, b1, first = tensors[model.first], tensors.get(model.first.replace("w", "b")), scales.get("w13")
    return lambda batch, tile: gate_up(
        batch.x, w1, model.mlp, batch.dispatched, tile, bias=b1, quantised=first, interleaved=model.interleaved
    )


def fault(kernel: str, got: Any, batch: Batch, weights: Weights) -> str | None:
    """What is wrong with an answer, or None. Judged in float64 on some tokens; ids, slots and copies on all."""
    model = batch.model
    match kernel:
        case "align":
            return _align_fault(got, batch)
        case "capture":
            return None if torch.equal(got[:, 1].int(), batch.ids) else "other ids"
        case "pad":
            return None if torch.equal(got, F.pad(batch.x, (0, model.padded - model.hidden))) else "other values"
        case "unpad":
            return None if torch.equal(got, batch.wide[:, : model.hidden]) else "other values"
        case "layer":
            # At the routing that it says it took; whether that is right is asked of `route`.
            got, ids, chosen = got
            batch = Batch(model, batch.x, batch.logits, ids, chosen, batch.config)
    for token in torch.linspace(0, len(batch.x) - 1, min(COMPARED, len(batch.x))).int().tolist():
        if kernel == "route":
            want = reference_routing.route_logits(batch.logits[token, None].double(), model.routing, _double(weights))
            if sorted(got[0][token].tolist()) != sorted(want.ids[0].tolist()):
                return f"token {token}: experts {got[0][token].tolist()}, want {want.ids[0].tolist()}"
            order, by_id = got[0][token].argsort(), want.ids[0].argsort()
            wrong = _distance(
                got[1][token][order], want.weights[0][by_id], torch.float32, ROUTING_ROUNDINGS + model.experts
            )
        else:
            mine, exact = _answer(kernel, got, token, batch, weights)
            wrong = _distance(mine, exact, torch.bfloat16, ROUNDINGS)
        if wrong:
            return f"token {token}: {wrong}"
    return None


def _answer(kernel: str, got: Tensor, token: int, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor]:
    """What a token got of a kernel, and what it should be, in float64."""
    model, spec = batch.model, batch.model.mlp
    ids, own = batch.ids[token].long(), batch.weights[token].double()
    pairs = slice(token * model.top_k, (token + 1) * model.top_k)
    if kernel == "combine":
        return got[token], own @ batch.outputs[pairs, : model.hidden].double()
    if kernel == "logits":
        exact_logits, _ = router_logits(batch.x[token, None].double(), model.layer.logits, _double(weights))
        return got[token], exact_logits[0]
    exact = weights.exact(ids)
    first, x = exact[model.first], batch.x[token].double()
    if kernel == "gate_up":
        projected = first @ x  # [K, 2F]
        if spec.bias:
            projected += exact[model.first.replace("w", "b")]
        return got[pairs], reference_experts.activate(projected, spec)
    if kernel == "down":
        outputs = torch.einsum("khf,kf->kh", exact["experts.w2"], batch.hidden[pairs].double())
        return got[pairs, : model.hidden], outputs + exact["experts.b2"] if spec.bias else outputs
    local = torch.arange(model.top_k, device=ids.device)[None]
    return got[token], reference_experts.routed_experts(x[None], spec, exact, local, own[None])[0]


def _double(weights: Weights) -> dict[str, Tensor]:
    return {name: t.double() for name, t in weights.tensors.items() if name.startswith("router.")}


def _distance(got: Tensor, want: Tensor, dtype: torch.dtype, roundings: int) -> str | None:
    distance = float((got.double() - want).norm() / want.norm())
    limit = roundings * torch.finfo(dtype).eps / 2
    return None if distance <= limit else f"off by {distance:.1e} of the exact answer's length, want {limit:.1e}"


def _align_fault(got: Aligned, batch: Batch) -> str | None:
    """As `Aligned` allows: any order of experts, and of pairs within one."""
    ids, block = batch.ids.flatten(), batch.config.block_m
    used = int(got.padded_count)
    pair = got.slot_to_pair[:used].long()
    expert = got.expert_of_block[: used // block].repeat_interleave(block)
    real = pair < len(ids)
    if not torch.equal(pair[real].sort().values, torch.arange(len(ids), device=ids.device)):
        return "some pair has no slot, or two"
    if not torch.equal(ids[pair[real]], expert[real].to(ids.dtype)):
        return "a pair lies in a block of another expert"
    fewest = int((-(-ids.bincount() // block)).sum()) * block
    return None if used == fewest else f"{used} slots in use, want {fewest}"
