"""SGLang's moe_align_block_size, around the one kernel for it that is Triton."""

from __future__ import annotations

from importlib import import_module

import torch

from moe_conformance.engine import Aligned, AlignInputs
from moe_conformance.engines.sglang import expert_map, interpreted, runtime
from moe_conformance.engines.sglang.refusing import refusals


def align(inputs: AlignInputs) -> Aligned:
    """As its experts call it: ids that its dispatcher has made local, -1 for pairs of other ranks and of no expert."""
    runtime.start()
    module = import_module("sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size")
    ids, experts = inputs.ids.int(), inputs.experts
    if inputs.expert_map is not None:
        ids = expert_map.local_ids(ids, inputs.expert_map.int())
        experts = max(1, int((inputs.expert_map >= 0).sum()))
    with interpreted.aligning(), refusals():
        slots, blocks, count = module.moe_align_block_size(ids.contiguous().to(torch.int32), inputs.block, experts)
    return Aligned(slots, blocks, count)
