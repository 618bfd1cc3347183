"""vLLM's moe_align_block_size: its buffers and its maps, around the compiled operator or the stand-in for it."""

from __future__ import annotations

import torch

from moe_conformance.engine import Aligned, AlignInputs
from moe_conformance.engines.vllm import interpreted, routing, runtime


def align(inputs: AlignInputs) -> Aligned:
    """As its Triton experts call it: with a map, pairs of other ranks are left out.

    vLLM's routers say "no expert" by -1, to kernels that have a map.
    """
    runtime.start()
    interpreted.require()
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    ids, expert_map = inputs.ids.int().contiguous(), inputs.expert_map
    routing.refuse_dropped(ids, on_cpu=False)
    if expert_map is None and (ids < 0).any():
        expert_map = torch.arange(inputs.experts, dtype=torch.int32, device=ids.device)
    slots, blocks, count = moe_align_block_size(
        ids, inputs.block, inputs.experts, expert_map, ignore_invalid_experts=expert_map is not None
    )
    return Aligned(slots, blocks, count)
