"""Decoder layers whose MoE block is not one module: the layer's own forward with everything else silenced.

For the adapters of servers. What a server's layers are told beside hidden states is the adapter's to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import Unsupported, called_by_engine


class Silent(nn.Module):
    """Stands for a part of the layer outside the block: notes what it is given, answers `answer`, or the same.

    A norm, attention, or what moves hidden states between them.
    """

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

    @called_by_engine
    def prepare(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Of what stands before a part: the norm and the residual."""
        answer: Tensor = self(hidden_states)
        return answer

    @called_by_engine
    def finish(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Of what stands behind one: the sum over ranks and the residual."""
        return hidden_states


class Around(nn.Module):
    """A decoder layer, given what its block is given, and asked for what the block adds.

    before: the part whose output the block reads. step: what the layer is told of a step.
    """

    def __init__(self, layer: Any, before: str, step: Callable[[], Mapping[str, Any]] = dict) -> None:
        super().__init__()
        self.layer, self.before, self.step = layer, before, step

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        getattr(self.layer, self.before).answer = x
        self.layer.self_attn.answer = zeros
        answer = self._run(zeros)
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output

    def _run(self, hidden: Tensor) -> Any:
        arguments = {"positions": torch.arange(len(hidden)), "hidden_states": hidden, "residual": None, **self.step()}
        wanted = inspect.signature(self.layer.forward).parameters
        return self.layer(**{name: value for name, value in arguments.items() if name in wanted})


class Gemma(Around):
    """Gemma 4's router reads the residual itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.self_attn.answer = self.layer.post_attention_layernorm.answer = torch.zeros_like(x)
        self._run(x)
        got: Tensor = self.layer.post_feedforward_layernorm.got
        return got


def whole_layer(layer: Any, written: Sequence[str], step: Callable[[], Mapping[str, Any]] = dict) -> nn.Module:
    """A layer with parts of its block beside each other. written: the parameters that the block's tensors went to."""
    kept = {name.partition(".")[0] for name in written} | {"experts", "router"}
    for name, module in list(layer.named_children()):
        if name not in kept:
            for parameter in module.parameters():
                parameter.data.fill_(1)  # somebody else may hold this norm, too
            setattr(layer, name, Silent())
    for name, _ in list(layer.named_parameters(recurse=False)):
        if name not in written:
            delattr(layer, name)
    if "pre_feedforward_layernorm_2" in kept:
        layer.layer_scalar = torch.ones(1)
        return Gemma(layer, "", step)
    if hasattr(layer, "post_attention_layernorm"):
        if hasattr(layer, "residual_multiplier"):
            layer.residual_multiplier = 1.0
        if hasattr(layer, "ffn_boundary"):
            layer.attn_boundary, layer.ffn_boundary = Silent(), Silent()
            return Around(layer, "ffn_boundary", step)
        return Around(layer, "post_attention_layernorm", step)
    raise Unsupported(
        f"block: parts of the block of {type(layer).__name__} lie apart in an unknown way: {sorted(kept)}"
    )
