"""Parts of a batch whose rows are compared with those of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Name -> of T tokens, which ones, in order.
BATCHES: Mapping[str, Callable[[int], Tensor]] = {
    "the first token alone": lambda tokens: torch.arange(1),
    "the last token alone": lambda tokens: torch.arange(tokens - 1, tokens),
    "the first half": lambda tokens: torch.arange(tokens // 2),
    "the batch the other way round": lambda tokens: torch.arange(tokens - 1, -1, -1),
}
