"""Decoder layers whose MoE block is not one module: the layer's own forward with everything else silenced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import Unsupported, called_by_engine


class Silent(nn.Module):
    """Stands for a part of the layer outside the block: notes what it is given, answers `answer`, or the same."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Tensor | None = None
        self.got: Tensor | None = None

    @called_by_engine
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A norm is given hidden states, or them and a residual; attention, them by name."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.got = hidden
        answer = hidden if self.answer is None else self.answer
        return answer if len(args) < 2 else (answer, args[1])


class Around(nn.Module):
    """A decoder layer, given what its block is given, and asked for what the block adds.

    before: the norm whose output the block reads. after: a norm behind the block, whose input is its output; without
    one the layer's output is, over a residual of zeros.
    """

    def __init__(self, layer: Any, before: str, after: str = "") -> None:
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        getattr(self.layer, self.before).answer = x
        self.layer.self_attn.answer = zeros
        arguments = {"positions": torch.arange(len(x)), "hidden_states": zeros, "residual": None}
        wanted = inspect.signature(self.layer.forward).parameters
        answer = self.layer(**{name: value for name, value in arguments.items() if name in wanted})
        if self.after:
            got: Tensor = getattr(self.layer, self.after).got
            return got
        return answer[0] if isinstance(answer, tuple) else answer


class Gemma(Around):
    """Gemma 4's router reads the residual itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.self_attn.answer = self.layer.post_attention_layernorm.answer = torch.zeros_like(x)
        self.layer(positions=torch.arange(len(x)), hidden_states=x, residual=None)
        got: Tensor = self.layer.post_feedforward_layernorm.got
        return got


def whole_layer(layer: Any, written: Sequence[str]) -> nn.Module:
    """A layer with parts of its block beside each other. written: the parameters that the block's tensors went to."""
    kept = {name.partition(".")[0] for name in written} | {"experts", "router"}
    for name, _ in list(layer.named_children()):
        if name not in kept:
            setattr(layer, name, Silent())
    for name, _ in list(layer.named_parameters(recurse=False)):
        if name not in written:
            delattr(layer, name)
    if "pre_feedforward_layernorm_2" in kept:
        layer.layer_scalar = torch.ones(1)
        return Gemma(layer, "")
    if hasattr(layer, "post_attention_layernorm"):
        if hasattr(layer, "residual_multiplier"):
            layer.residual_multiplier = 1.0
        return Around(layer, "post_attention_layernorm")
    raise Unsupported(
        f"block: parts of the block of {type(layer).__name__} lie apart in an unknown way: {sorted(kept)}"
    )
