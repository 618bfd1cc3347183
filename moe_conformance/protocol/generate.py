"""Whole models: what a running engine is given, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GenerateInputs:
    """Requests that reach the engine at the same time, to be answered greedily.

    folder: a model as published: config.json and safetensors, without a tokenizer. prompts: token ids of each request.
    new_tokens: of each, whatever they are; none ends a request. routed: the experts of each token are asked for, too.
    step_tokens: at most so many tokens go into one step of the model, so that a longer prompt is split; 0: no limit is
    asked for. shares_prefixes: what was computed of a prefix serves later requests that begin with it.
    answers_each: each request is answered so many times (n of a request), the answers of one standing together.
    cache_tokens: at most so many tokens lie in the cache at once, fewer than all requests have at their ends, so that
    some are interrupted and go on later; 0: no limit is asked for. withdrawn: numbers of requests that are withdrawn
    after their first new token; how they are answered is the engine's affair. ranks: so many processes divide the model
    (tensor parallelism). dtype: in which the model computes; its tensors in the folder are float32.
    """

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    routed: bool = False
    step_tokens: int = 0
    shares_prefixes: bool = False
    answers_each: int = 1
    cache_tokens: int = 0
    withdrawn: tuple[int, ...] = ()
    ranks: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"


class Generated(NamedTuple):
    """One entry an answer, in the order of the requests.

    tokens: the new ones. routed: logical expert ids [P + G - 1, L, K] of the P tokens of the prompt and all new ones
    but the last, which nothing was computed for; a layer without experts may have any ids. None where not asked for.
    """

    tokens: tuple[tuple[int, ...], ...]
    routed: tuple[Tensor, ...] | None = None
