"""One rank's part of SGLang's expert layer: its experts, or its slice of each, cut out by SGLang's own loader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_conformance.engine import MLPSpec, ShardInputs, Unsupported
from moe_conformance.engines.sglang import built, eplb, expert_map, experts, runtime
from moe_conformance.engines.sglang.refusing import refusals


def features() -> frozenset[str]:
    """Not "idle_ranks": its models refuse more ranks than experts."""
    return experts.features() - {"expert_map", "lora"} | {"shared", "tensor_parallel", "uneven_width", "replicas"}


@torch.no_grad()
def shard(inputs: ShardInputs, kernels: Sequence[built.Kernel]) -> tuple[Tensor, str]:
    """This rank's part, and what computed it: the first of these kernels that takes the call."""
    return built.by_first(kernels, lambda kernel: _shard(inputs, kernel))


def _shard(inputs: ShardInputs, kernel: built.Kernel) -> tuple[Tensor, str]:
    whole = inputs.whole
    if whole.identity_experts or whole.output_scale != 1:
        raise Unsupported("shard: SGLang's blocks scale the sum, and add what identity experts pass on, themselves")
    ep, tp = (inputs.ep_rank, inputs.ep_size), (inputs.tp_rank, inputs.tp_size)
    copies, ids = inputs.physical_to_logical, whole.ids.int()
    if copies is None and not _in_runs(inputs):
        copies = _placement(inputs)
        # Pairs without an expert have no copies; SGLang takes rows of padding out behind this choice.
        ids = torch.where(ids < 0, ids, _physical(ids.clamp(min=0), copies, whole.experts))
    elif not _in_runs(inputs):
        raise Unsupported("shard: SGLang gives each rank a run of physical ids, in order of ranks")
    elif copies is not None:
        if (ids < 0).any():
            raise Unsupported("shard: no router of SGLang's leaves a pair without an expert before copies are chosen")
        ids = _physical(ids, copies, whole.experts)
    layer = built.Layer(
        whole.mlp, whole.x.shape[-1], ids.shape[-1], whole.x.dtype, whole.tensors, ep=ep, tp=tp, copies=copies
    )
    made = built.Built(layer, kernel)
    found = made.run(whole.x, ids, whole.weights)
    if inputs.shared is not None:
        found = found + _shared(inputs, inputs.shared)
    return found, made.name


def _physical(ids: Tensor, copies: Tensor, experts: int) -> Tensor:
    return eplb.physical_ids(ids, eplb.metadata_of(copies, experts), len(ids))[0]


def _in_runs(inputs: ShardInputs) -> bool:
    """Whether this rank holds what SGLang gives it unasked: as many as the others, in order of ids."""
    if len(inputs.expert_map) % inputs.ep_size:
        return False
    own = expert_map.dispatcher_of(len(inputs.expert_map), inputs.ep_rank, inputs.ep_size).local_expert_mapping
    return own is None or torch.equal(own.long(), inputs.expert_map.long())


def _placement(inputs: ShardInputs) -> Tensor:
    """[P]: a physical_to_logical_map that SGLang can be started with, in which this rank holds these experts.

    Ranks have as many slots. One that is left over has a copy of an expert of the same rank, so that whichever copy is
    chosen, the pair is that rank's. What this rank computes does not depend on where the experts of others are.
    """
    local, (rank, ranks) = inputs.expert_map.long(), (inputs.ep_rank, inputs.ep_size)
    here = (local >= 0).nonzero().flatten()
    here, others = here[local[here].argsort()], (local < 0).nonzero().flatten()
    if not len(here) or len(others) < ranks - 1:
        raise Unsupported("shard: every rank of SGLang's holds an expert")
    slots = max(len(here), -(-len(others) // (ranks - 1))) if ranks > 1 else len(here)
    parts = list(others.tensor_split(ranks - 1)) if ranks > 1 else []
    parts.insert(rank, here)
    return torch.cat([torch.cat((part, part[:1].expand(slots - len(part)))) for part in parts])


def _shared(inputs: ShardInputs, spec: MLPSpec) -> Tensor:
    """The rank's slice of a shared expert, as Qwen2-MoE has one: divided among all ranks, however experts are."""
    from sglang.srt.models.qwen2_moe import Qwen2MoeMLP

    if spec != MLPSpec(spec.width, dtype=spec.dtype):
        raise Unsupported(f"shard: no model of SGLang's that is built here has a shared expert of {spec}")
    x, tensors = inputs.whole.x, inputs.shared_tensors
    ep, tp = (inputs.ep_rank, inputs.ep_size), (inputs.tp_rank, inputs.tp_size)
    with runtime.building(x.dtype), runtime.as_rank(ep, tp), refusals():
        module = Qwen2MoeMLP(x.shape[-1], spec.width, "silu", reduce_results=False, prefix="shared")
        gate, up = tensors["shared.w13"].chunk(2)
        for name, values in (
            ("gate_up_proj.weight", (gate, 0)),
            ("gate_up_proj.weight", (up, 1)),
            ("down_proj.weight", (tensors["shared.w2"],)),
        ):
            parameter = module.get_parameter(name)
            parameter.weight_loader(parameter, *values)
        _ready(module)
        answer: Tensor = module(x.clone())
    return answer


def _ready(module: nn.Module) -> None:
    for part in module.modules():
        if (method := getattr(part, "quant_method", None)) is not None:
            method.process_weights_after_loading(part)
