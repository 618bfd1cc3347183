"""Builds the tensors of a checkpoint: parts of canonical tensors, laid out as their family stores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_conformance.model.families.naming import Op, Piece
from moe_conformance.model.families.record import Record
from moe_conformance.model.specs import LayerSpec
from moe_conformance.oracle.naming import Entry, Part, entries


def tensor_of(entry: Entry, canonical: Mapping[str, Tensor]) -> Tensor:
    """What a checkpoint holds under that name; for experts that compute nothing, values that must never be read."""
    spec = entry.layer.spec
    found = [_stored(piece, part, canonical, spec) for piece, part in zip(entry.pieces, entry.parts, strict=False)]
    if not found:
        (piece,) = entry.pieces
        like = canonical[entry.layer.prefix + piece.target][0]
        return torch.full_like(like.chunk(2)[0], 7.0)
    return (torch.cat(found) if len(found) > 1 else found[0]).contiguous().clone()


def _stored(piece: Piece, part: Part, canonical: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    tensor = canonical[part.tensor]
    if part.expert is not None:
        tensor = tensor[part.expert]
    if part.half is not None:
        routed = part.expert is None and ".experts." in part.tensor
        tensor = tensor.chunk(2, dim=1 if routed else 0)[part.half]
    for op in piece.ops:
        tensor = _arranged(tensor, op, spec)
    return tensor


def _arranged(tensor: Tensor, op: Op, spec: LayerSpec) -> Tensor:
    """One step from the canonical layout to the stored one."""
    if op == "transposed":
        return tensor.mT
    if op == "interleaved":  # rows as gate, up, gate, up
        gate, up = tensor.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)
    if op == "stacked":  # the experts below each other
        return tensor.reshape(-1, *tensor.shape[2:])
    if op == "row":
        return tensor[None]
    if op == "padded":  # rows for the identity experts, which nothing reads
        return torch.cat((tensor, tensor.new_full((spec.routing.identity_experts, *tensor.shape[1:]), 7.0)))
    count = spec.shared.count if spec.shared else 1
    if op == "apart":  # each shared expert by itself
        return tensor.reshape(count, -1, *tensor.shape[1:])
    if op == "apart_columns":
        return torch.stack(tensor.chunk(count, dim=1))
    gate, up = (half.reshape(count, -1, half.shape[1]) for half in tensor.chunk(2))  # apart_interleaved
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def checkpoint_of(
    record: Record, config: Mapping[str, Any], index: int, canonical: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one decoder layer's MoE block, as the family's published checkpoints name them and lay them out.

    config: as in config.json. canonical: as `LayerSpec.tensors` names and shapes them. Tensors that nothing reads are
    left out: transformers writes them, published checkpoints do not have them.
    """
    transposed = record.names is not None and record.names.once_transposed
    for entry in entries(record, config, "published"):
        if entry.layer.index == index and entry.layer.prefix.startswith("layers.") and entry.parts:
            tensor = tensor_of(entry, {entry.layer.prefix + name: t for name, t in canonical.items()})
            packed = entry.expert is None and entry.pieces[0].target.startswith("experts.w")
            yield entry.name, tensor.mT.contiguous() if transposed and packed else tensor
