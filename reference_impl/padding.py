"""Padding of hidden and intermediate dims to the widths a kernel can run at.

TRT-LLM's NVFP4 experts want multiples of 256: Nemotron-3-Nano's 2688 becomes 2816 (vllm#40794).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from moe_conformance.errors import InputError
from moe_conformance.model.specs import MLPSpec


def round_up(width: int, multiple: int) -> int:
    """The next multiple of `multiple`, which is `width` itself where it is one already."""
    return -(-width // multiple) * multiple


def pad(x: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Widen the last dim to `width`, the new columns holding `fill`. [..., D] -> [..., width].

    Raises InputError if x is wider than `width`.
    """
    if width < x.shape[-1]:
        raise InputError(f"pad: got {x.shape[-1]} columns, want at most the padded width {width}")
    return F.pad(x, (0, width - x.shape[-1]), value=fill)


def unpad(x: Tensor, width: int) -> Tensor:
    """Keep the first `width` columns of the last dim; the others are never read."""
    if width > x.shape[-1]:
        raise InputError(f"unpad: got {x.shape[-1]} columns, want at least the true width {width}")
    return x[..., :width]


def pad_expert_weights(
    tensors: Mapping[str, Tensor], spec: MLPSpec, hidden: int, intermediate: int
) -> dict[str, Tensor]:
    """The experts' tensors at kernel widths D' = hidden and F' = intermediate.

    w13: [E, 2F, D] -> [E, 2F', D']; gate and up are padded each on its own, in b13, too. w2: [E, D, F] -> [E, D', F'];
    b2: [E, D']. Dims that are summed over are padded with zeros, which add nothing. The rows of w2 that produce padded
    output columns are NaN: those columns are garbage by contract, and a leak must show. The output norm keeps the true
    width.
    """
    first, halves = ("13", 2) if spec.gated else ("1", 1)
    w1, w2 = tensors[f"experts.w{first}"], tensors["experts.w2"]
    (width, rows), columns = w2.shape[1:], hidden - w1.shape[2]
    apart = w1.unflatten(1, (halves, rows))  # [E, 2, F, D]
    padded = {
        **{name: tensors[name] for name in spec.tensors("experts", width)},
        f"experts.w{first}": F.pad(apart, (0, columns, 0, intermediate - rows)).flatten(1, 2),
        "experts.w2": F.pad(pad(w2, intermediate), (0, 0, 0, hidden - width), value=float("nan")),
    }
    if spec.bias:
        padded[f"experts.b{first}"] = pad(tensors[f"experts.b{first}"].unflatten(1, (halves, rows)), intermediate)
        padded[f"experts.b{first}"] = padded[f"experts.b{first}"].flatten(1, 2)
        padded["experts.b2"] = pad(tensors["experts.b2"], hidden)
    return padded
