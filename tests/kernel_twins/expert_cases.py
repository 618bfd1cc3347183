"""Experts that the twins share: every activation, clamp, place of the weight and bias, and what their sum must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.grouped_kernel import Dispatched
from moe_conformance.kernels.tuning import Tile
from moe_conformance.oracle.experts import experts_value
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.reference_impl import experts as reference_experts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = 0.75
# Every activation, clamp, place of the weight and bias; the widths fill no tile, but for one that fills all.
SPECS = {
    "silu": MLPSpec(37),
    "gelu, bias, weight on input": MLPSpec(37, "gelu", bias=True, weight_on="input"),
    "gelu tanh": MLPSpec(64, "gelu_tanh"),
    "relu2, no gate": MLPSpec(37, "relu2", gated=False, bias=True, weight_on="w2_input", alpha=1.5),
    "relu, no gate": MLPSpec(16, "relu", gated=False),
    "gpt-oss": MLPSpec(37, clamp="before", limit=LIMIT, alpha=1.5, up_offset=1.0, bias=True),
    "clamp after": MLPSpec(37, clamp="after", limit=LIMIT, weight_on="w2_input"),
    "softcaps": MLPSpec(37, clamp="tanh", limit=LIMIT, up_limit=2.25),
}
# Steps of depth and columns that do not divide the widths, one block of pairs a group and several.
TILES = {
    "one tile": Tile(64, 64, group_m=8),
    "many tiles": Tile(16, 16, group_m=1),
    "groups of three": Tile(32, 32, group_m=3),
}


def weights_of(spec: MLPSpec, hidden: int, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """About one over the root of what is summed over, so that activations are neither linear nor saturated."""
    return {
        name: normal(shape, name, dtype, 0.5 if ".b" in name else 0.25 if len(shape) > 2 else 0.125)
        for name, shape in spec.tensors("experts", hidden, (count,)).items()
    }


def ids_of(tokens: int, top_k: int, count: int, dropped: bool) -> Tensor:
    """K different experts a token, none of them 2; a third of the pairs names no expert."""
    order = distinct_logits(tokens, count, "ids").argsort()
    ids = order[order != 2].view(tokens, count - 1)[:, :top_k].contiguous()
    outside = torch.tensor([-1, count + 3, 2**31 - 1])[integers((tokens, top_k), "outside", 3)]
    return torch.where(integers((tokens, top_k), "gone", 3) == 0, outside, ids) if dropped else ids


def share_of(tokens: int, top_k: int) -> Tensor:
    """Weights that float16 does not hold."""
    return integers((tokens, top_k), "weights", 16, low=1).float() / 7


def dispatched_of(ids: Tensor, count: int, block: int, sort: bool, device: str) -> Dispatched:
    ids = ids.to(device)
    return Dispatched(ids, count, block, align(ids, count, block) if sort else None)


def same_sum(
    what: str,
    got: Tensor,
    x: Tensor,
    spec: MLPSpec,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    share: Tensor,
    *,
    identity_experts: int = 0,
    output_scale: float = 1.0,
    added: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> None:
    """The reference in float64 at these ids, with the bound of a layer that stores what kernels store."""
    experts = len(tensors["experts.w2"]) if expert_map is None else len(expert_map)
    known = ids.where((ids >= 0) & (ids < experts + identity_experts), -1)  # the reference refuses others
    wide, storage = {name: tensor.double() for name, tensor in tensors.items()}, Storage.stored(x.dtype)
    held: dict[str, Any] = {"identity_experts": identity_experts, "expert_map": expert_map}
    want = reference_experts.routed_experts(
        x.double(), spec, wide, known, share.double(), output_scale=output_scale, **held
    )
    value = experts_value(Value.of(x), spec, tensors, known, Value.of(share), storage, **held)
    value = (value * Value.of(output_scale)).stored(torch.float32)
    if added is not None:
        value, want = value + Value.of(added), want + added.double()
    compare.close(what, got, want, value.stored(x.dtype).bound("float32 sums and stored tensors"))
