"""Padding of hidden and intermediate dims to the widths a kernel can run at.

TRT-LLM's NVFP4 experts want multiples of 256: Nemotron-3-Nano's 2688 becomes 2816 (vllm#40794).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_conformance.errors import InputError


def round_up(width: int, multiple: int) -> int:
    """The next multiple of `multiple`, which is `width` itself where it is one already."""
    return -(-width // multiple) * multiple


def pad(x: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Widen the last dim to `width`, the new columns holding `fill`. [..., D] -> [..., width].

    Raises InputError if x is wider than `width`.
    """
    if width < x.shape[-1]:
        raise InputError(f"pad: got {x.shape[-1]} columns, want at most the padded width {width}")
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=fill)


def unpad(x: Tensor, width: int) -> Tensor:
    """Keep the first `width` columns of the last dim; whatever stands in the others is never read."""
    if width > x.shape[-1]:
        raise InputError(f"unpad: got {x.shape[-1]} columns, want at least the true width {width}")
    return x[..., :width]


def pad_expert_weights(w13: Tensor, w2: Tensor, hidden: int, intermediate: int) -> tuple[Tensor, Tensor]:
    """Expert weights at kernel widths.

    w13: [E, 2F, D] -> [E, 2 intermediate, hidden]; gate and up are padded each on its own. w2: [E, D, F] ->
    [E, hidden, intermediate]. What is summed over is padded with zeros, so it adds nothing. The rows of w2 that
    produce padded output columns are NaN: those columns are garbage by contract, and a leak must show.
    """
    experts, _, width = w13.shape
    gate_up = w13.unflatten(1, (2, -1))  # [E, 2, F, D]
    rows = intermediate - gate_up.shape[2]
    gate_up = torch.nn.functional.pad(gate_up, (0, hidden - width, 0, rows))  # [E, 2, F', D']
    down = pad(w2, intermediate)
    garbage = down.new_full((experts, hidden - width, intermediate), float("nan"))
    return gate_up.flatten(1, 2), torch.cat([down, garbage], dim=1)
