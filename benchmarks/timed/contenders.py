"""What else computes the same: torch, transformers and vLLM, each asked by attribute and signature.

Each answers as the kernel does, so that one check judges all. What is not installed, or cannot do a model, says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from kernel_inputs import Batch
from model_shapes import Model, Weights
from torch import Tensor, nn
from torch.nn import functional as F

from moe_conformance.engine import Aligned
from moe_conformance.reference_impl.dispatch import slot_count
from moe_conformance.reference_impl.experts import activate, routed_experts
from moe_conformance.reference_impl.layer import layer

# batched_mm copies the weights of every pair: beyond this many tokens it is no contender.
BATCHED_TOKENS = 8


@dataclass(frozen=True)
class Contender:
    """graph: it waits for nothing on the device, so that it can be recorded. slow: it takes seconds to be ready.

    call: None where it cannot run, and then reason says why. most_tokens: beyond which it is no contender.
    """

    name: str
    call: Callable[[Batch], Any] | None
    graph: bool = True
    slow: bool = False
    reason: str = ""
    most_tokens: float = math.inf


def contenders(kernel: str, model: Model, weights: Weights) -> list[Contender]:
    match kernel:
        case "route":
            call = torch_route(model, weights)
            return [Contender("torch", call), compiled(call), *vllm("fused_topk", lambda: vllm_route(model))]
        case "align":
            return [
                Contender("torch", lambda batch: torch_align(batch, model.experts)),
                *vllm("moe_align_block_size", lambda: vllm_align(model)),
            ]
        case "gate_up" | "down" if not model.fp8:
            product = torch_gate_up if kernel == "gate_up" else torch_down
            return [Contender("torch grouped_mm", lambda batch: product(batch, model, weights))]
        case "combine":

            def call(batch: Batch) -> Tensor:
                pairs = batch.outputs.unflatten(0, batch.ids.shape)[..., : model.hidden]
                return (pairs * batch.weights[..., None]).sum(1).to(batch.x.dtype)

            return [Contender("torch", call), compiled(call)]
        case "capture":  # torch's copy checks no id
            return [Contender("torch", torch_capture)]
        case "pad":
            return [Contender("torch", lambda batch: F.pad(batch.x, (0, model.padded - model.hidden)))]
        case "unpad":
            return [Contender("torch", lambda batch: batch.wide[:, : model.hidden].contiguous())]
        case "experts" if not model.fp8:
            return experts(model, weights)
        case "layer" if not model.fp8:
            tensors = reference_tensors(weights)
            return [] if tensors is None else [
                Contender("torch eager", lambda batch: layer(batch.x, model.layer, tensors)[:3], graph=False)
            ]  # fmt: skip
    return []


def experts(model: Model, weights: Weights) -> list[Contender]:
    tensors = reference_tensors(weights)
    found = []
    if tensors is not None:
        loop = lambda batch: routed_experts(batch.x, model.mlp, tensors, batch.ids, batch.weights)  # noqa: E731
        found.append(Contender("torch eager", loop, graph=False))

    def grouped(batch: Batch) -> Tensor:
        return torch_experts(batch, model, weights)

    found += [Contender("torch grouped_mm", grouped), compiled(grouped)]
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        name = f"transformers {implementation}"
        try:
            module = transformers_experts(model, weights, implementation)
        except (ImportError, AttributeError, KeyError) as error:
            found.append(Contender(name, None, reason=f"{type(error).__name__}: {error}"))
            continue
        call = lambda batch, module=module: module(batch.x, batch.ids.long(), batch.weights)  # noqa: E731
        most = BATCHED_TOKENS if implementation == "batched_mm" else math.inf
        found.append(Contender(name, call, graph=implementation != "eager", most_tokens=most))
    return [*found, *vllm("fused_experts", lambda: vllm_experts(model, weights))]


def compiled(call: Callable[[Batch], Any]) -> Contender:
    """One compilation for every number of tokens but 1. On a CPU, where no time counts, without code generation."""
    backend = "inductor" if torch.cuda.is_available() else "eager"
    return Contender("torch.compile", torch.compile(call, dynamic=True, fullgraph=True, backend=backend), slow=True)


def reference_tensors(weights: Weights) -> dict[str, Tensor] | None:
    """As the reference takes them, views; None where rows are interleaved, which it does not know."""
    if weights.model.interleaved:
        return None
    own = {name: t for name, t in weights.tensors.items() if not name.startswith("experts.")}
    return own | {n: weights.unpadded(n.removeprefix("experts.")) for n in weights.tensors if n not in own}


def torch_route(model: Model, weights: Weights) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """As models write it, ties to whichever torch.topk gives."""
    spec, tensors = model.routing, weights.tensors

    def call(batch: Batch) -> tuple[Tensor, Tensor]:
        if spec.select_on == "logits":
            chosen, ids = batch.logits.topk(spec.top_k)
            return ids, chosen.softmax(-1)
        scores = batch.logits.softmax(-1) if spec.score == "softmax" else batch.logits.sigmoid()
        compared = scores + tensors["router.selection_bias"] if spec.selection_bias else scores
        if spec.groups > 1:
            grouped = compared.unflatten(1, (spec.groups, -1))
            best = grouped.topk(2, dim=2).values.sum(2).topk(spec.top_groups).indices
            outside = torch.ones_like(grouped[..., 0]).scatter(1, best, 0).bool()
            compared = grouped.masked_fill(outside[..., None], spec.group_mask).flatten(1)
        ids = compared.topk(spec.top_k).indices
        chosen = scores.gather(1, ids)
        chosen = chosen / (chosen.sum(-1, keepdim=True) + spec.epsilon) * spec.scale
        return ids, chosen * tensors["router.per_expert_scale"][ids] if spec.per_expert_scale else chosen

    return call


def torch_align(batch: Batch, experts: int) -> Aligned:
    pairs, block, device = batch.ids.numel(), batch.config.block_m, batch.ids.device
    expert, pair = batch.ids.flatten().long().sort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, expert, torch.ones_like(expert))
    blocks = (counts + block - 1) // block
    ends = blocks.cumsum(0)
    first_pair, first_slot = counts.cumsum(0) - counts, (ends - blocks) * block
    slots = slot_count(pairs, experts, block)
    slot = first_slot[expert] + torch.arange(pairs, device=device) - first_pair[expert]
    slot_to_pair = torch.full((slots,), pairs, device=device).scatter_(0, slot, pair)
    block_expert = torch.searchsorted(ends, torch.arange(slots // block, device=device), right=True)
    return Aligned(slot_to_pair.int(), block_expert.where(block_expert < experts, -1).int(), ends[-1:] * block)


def torch_capture(batch: Batch) -> Tensor:
    batch.buffer[:, 1].copy_(batch.ids)
    return batch.buffer


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x [R, D], sorted by expert, times w [E, rows, D] of its expert."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(x, w.transpose(1, 2), offs=ends)


def torch_gate_up(batch: Batch, model: Model, weights: Weights) -> Tensor:
    """In the order of pairs, as the kernel's; sorting and unsorting are part of it."""
    pair, expert, ends = sorted_pairs(batch.ids, model.experts)
    return unsorted(_gate_up(batch.x[pair // model.top_k], expert, ends, model, weights), pair)


def torch_down(batch: Batch, model: Model, weights: Weights) -> Tensor:
    pair, expert, ends = sorted_pairs(batch.ids, model.experts)
    return unsorted(_down(batch.hidden[pair], expert, ends, weights), pair)


def torch_experts(batch: Batch, model: Model, weights: Weights) -> Tensor:
    pair, expert, ends = sorted_pairs(batch.ids, model.experts)
    hidden = _gate_up(batch.x[pair // model.top_k], expert, ends, model, weights)
    outputs = unsorted(_down(hidden, expert, ends, weights) * batch.weights.flatten()[pair, None], pair)
    return outputs.unflatten(0, batch.ids.shape).sum(1).to(batch.x.dtype)


def sorted_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in the order of their experts [R], the expert of each, and where each expert ends [E] int32."""
    expert, pair = ids.flatten().sort(stable=True)
    following = torch.arange(1, experts + 1, dtype=ids.dtype, device=ids.device)
    return pair, expert, torch.searchsorted(expert, following, out_int32=True)


def unsorted(rows: Tensor, pair: Tensor) -> Tensor:
    return torch.empty_like(rows).index_copy_(0, pair, rows)


def _gate_up(x: Tensor, expert: Tensor, ends: Tensor, model: Model, weights: Weights) -> Tensor:
    projected = grouped_mm(x, weights.unpadded(model.first.removeprefix("experts.")), ends)
    if model.mlp.bias:
        projected = projected + weights.tensors["experts.b13"][expert]
    if model.interleaved:
        projected = torch.cat([projected[:, ::2], projected[:, 1::2]], dim=1)
    return activate(projected, model.mlp)


def _down(hidden: Tensor, expert: Tensor, ends: Tensor, weights: Weights) -> Tensor:
    outputs = grouped_mm(hidden, weights.unpadded("w2"), ends)
    return outputs + weights.tensors["experts.b2"][expert] if "experts.b2" in weights.tensors else outputs


def transformers_experts(model: Model, weights: Weights, implementation: str) -> nn.Module:
    """The real module of a model with such experts, on these very weights."""
    from transformers.activations import ACT2FN

    tensors, mlp = {n: weights.unpadded(n) for n in ("w13", "w1", "w2") if f"experts.{n}" in weights.tensors}, model.mlp
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(mlp.activation, mlp.activation)
    config = SimpleNamespace(
        num_experts=model.experts, num_local_experts=model.experts, n_routed_experts=model.experts,
        hidden_size=model.hidden, moe_intermediate_size=model.width, intermediate_size=model.width,
        moe_latent_size=None, hidden_act=activation, mlp_hidden_act=activation,
        swiglu_alpha=mlp.alpha, swiglu_limit=mlp.limit, _experts_implementation=implementation,
    )  # fmt: skip
    ACT2FN[activation]  # KeyError where this release does not know it
    if mlp.bias:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        own = {"gate_up_proj": tensors["w13"].transpose(1, 2), "down_proj": tensors["w2"].transpose(1, 2)}
        own |= {"gate_up_proj_bias": weights.tensors["experts.b13"], "down_proj_bias": weights.tensors["experts.b2"]}
    elif not mlp.gated:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        own = {"up_proj": tensors["w1"], "down_proj": tensors["w2"]}
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        own = {"gate_up_proj": tensors["w13"], "down_proj": tensors["w2"]}
    with torch.device("meta"):
        module = Experts(config)
    for name, tensor in own.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def vllm(name: str, make: Callable[[], Callable[[Batch], Any] | str]) -> list[Contender]:
    """make: returns the call, or why there is none. Nothing where vllm is not installed, which the header says."""
    if importlib.util.find_spec("vllm") is None:
        return []
    try:
        call = make()
    except Exception as error:  # its import alone can fail in any way
        call = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    failed = isinstance(call, str)
    return [Contender(f"vllm {name}", None if failed else call, reason=call if failed else "")]


def vllm_route(model: Model) -> Callable[[Batch], tuple[Tensor, Tensor]] | str:
    from vllm.model_executor.layers.fused_moe import fused_topk

    spec = model.routing
    if spec.score != "softmax" or spec.select_on == "logits" or spec.per_expert_scale:
        return "another method"

    def call(batch: Batch) -> tuple[Tensor, Tensor]:
        weights, ids, *_ = fused_topk(batch.x, batch.logits, spec.top_k, True)
        return ids, weights

    return call


def vllm_align(model: Model) -> Callable[[Batch], Aligned]:
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as module

    align = getattr(module, "moe_align_block_size", module)  # a function, or the module of that name
    return lambda batch: Aligned(*align(batch.ids, batch.config.block_m, model.experts))


def vllm_experts(model: Model, weights: Weights) -> Callable[[Batch], Tensor] | str:
    from vllm.model_executor.layers.fused_moe import fused_experts

    if not model.mlp.gated or model.mlp.bias:
        return "its arguments differ for experts without a gate or with biases"
    parameters = inspect.signature(fused_experts).parameters
    activation = parameters["activation"].default
    # A str in early releases, an enum of such strings later, neither of which may know gelu_tanh.
    kind = type(activation)
    words = (model.mlp.activation, model.mlp.activation.removesuffix("_tanh"))
    word = words[1] if kind is str else next(kind(w) for w in words if w in {item.value for item in kind})
    w13, w2 = weights.unpadded("w13"), weights.unpadded("w2")

    def call(batch: Batch) -> Tensor:
        with vllm_context():
            return fused_experts(batch.x, w13, w2, batch.weights, batch.ids, activation=word)

    return call


@cache
def vllm_config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


def vllm_context() -> contextlib.AbstractContextManager[Any]:
    from vllm import config

    return config.set_current_vllm_config(vllm_config())
