"""Whole models: greedy generation with transformers' cache, and the experts that each token is sent to."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from moe_conformance.engine import Generated, GenerateInputs, called_by_engine
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.loading import LoadedBlock, blocks, class_of_folder
from moe_conformance.errors import Unsupported


def generate(inputs: GenerateInputs, implementation: str, device: str) -> Generated:
    """One request after the other: transformers has no scheduler, and would pad a batch on the left."""
    if inputs.shares_prefixes:
        raise Unsupported("generate: transformers shares no cache between requests")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = class_of_folder(inputs.folder).from_pretrained(
        inputs.folder, dtype=getattr(torch, inputs.dtype), local_files_only=True, experts_implementation=implementation
    )
    every = list(blocks(model.to(device)))
    layers = model.config.get_text_config().num_hidden_layers
    tokens, routed = [], []
    for prompt in inputs.prompts:
        with ExitStack() as stack, torch.no_grad():
            taps = [Steps(block) for block in every] if inputs.routed else []
            for tap in taps:
                stack.enter_context(tap)
            chunk = {"prefill_chunk_size": inputs.step_tokens} if inputs.step_tokens else {}
            ids = torch.tensor([prompt], device=device)
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=inputs.new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                **chunk,
            )
        tokens.append(tuple(answer[0, len(prompt) :].tolist()))
        if inputs.routed:
            routed.append(_by_layer(taps, layers))
    return Generated(tuple(tokens), tuple(routed) if inputs.routed else None)


class Steps(Tap):
    """The routing of every call of a block, not just the last."""

    def __init__(self, block: LoadedBlock) -> None:
        super().__init__(block.moe, None)
        self.layer = int(block.prefix.split(".")[1])
        self.steps: list[Tensor] = []

    @called_by_engine
    def _note(self, seen: Any) -> None:
        self.steps.append(seen.ids)


def _by_layer(taps: list[Steps], layers: int) -> Tensor:
    """[P + G - 1, L, K], -1 in a layer without experts."""
    rows = {tap.layer: torch.cat(tap.steps).cpu() for tap in taps}
    like = next(iter(rows.values()))
    return torch.stack([rows.get(layer, torch.full_like(like, -1)) for layer in range(layers)], dim=1)
