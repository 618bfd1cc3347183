"""Whole models: what a running engine is given, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GenerateInputs:
    """Requests that reach the engine at the same time, to be answered greedily in float32.

    folder: a model as published: config.json and safetensors, without a tokenizer. prompts: token ids of each request.
    new_tokens: of each, whatever they are; none ends a request. routed: the experts of each token are asked for, too.
    step_tokens: at most so many tokens go into one step of the model, so that a longer prompt is split; 0: no limit is
    asked for. shares_prefixes: what was computed of a prefix serves later requests that begin with it.
    """

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    routed: bool = False
    step_tokens: int = 0
    shares_prefixes: bool = False


class Generated(NamedTuple):
    """One entry a request, in their order.

    tokens: the new ones. routed: logical expert ids [P + G - 1, L, K] of the P tokens of the prompt and all new ones
    but the last, which nothing was computed for; a layer without experts may have any ids. None where not asked for.
    """

    tokens: tuple[tuple[int, ...], ...]
    routed: tuple[Tensor, ...] | None = None
