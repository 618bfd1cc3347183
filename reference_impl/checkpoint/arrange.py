"""How the part of a canonical tensor that one checkpoint tensor holds is cut out, and laid out as it is stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_conformance.model.families.naming import Op, Piece
from moe_conformance.reference_impl.checkpoint.places import Sizes


def part(tensor: Tensor, piece: Piece, expert: int | None) -> Tensor:
    """A view of the canonical tensor: one expert of it where one is given, and the gate or the up rows.

    tensor: [E, ...] for routed experts, else without E. Rows are dim 1 behind E, dim 0 without.
    """
    if expert is not None:
        tensor = tensor[expert]
    if piece.half is None:
        return tensor
    rows = 1 if expert is None and ".experts." in f".{piece.target}" else 0
    return tensor.chunk(2, rows)[piece.half]


def to_stored(tensor: Tensor, piece: Piece, sizes: Sizes) -> Tensor:
    """A part as the checkpoint stores it."""
    for op in piece.ops:
        tensor = OPS[op][0](tensor, sizes)
    return tensor


def to_canonical(stored: Tensor, piece: Piece, sizes: Sizes) -> Tensor:
    """The inverse of `to_stored`."""
    for op in reversed(piece.ops):
        stored = OPS[op][1](stored, sizes)
    return stored


def _transposed(tensor: Tensor, _: Sizes) -> Tensor:
    return tensor.transpose(-1, -2)


def _swapped(tensor: Tensor, outer: int) -> Tensor:
    """Dim 1 seen as [outer, inner], turned into [inner, outer]."""
    swapped: Tensor = tensor.unflatten(1, (outer, -1)).transpose(1, 2).flatten(1, 2)
    return swapped


Form = Callable[[Tensor, Sizes], Tensor]
# op -> to the stored form and back.
OPS: dict[Op, tuple[Form, Form]] = {
    "transposed": (_transposed, _transposed),
    # [E, 2F, ...], gate above up <-> gate, up, gate, up
    "interleaved": (lambda t, _: _swapped(t, 2), lambda t, _: _swapped(t, t.shape[1] // 2)),
    # [E, F, D] <-> [E F, D]
    "stacked": (lambda t, _: t.flatten(0, 1), lambda t, n: t.unflatten(0, (n.experts, -1))),
    # [E] <-> [1, E]
    "row": (lambda t, _: t.unsqueeze(0), lambda t, _: t.squeeze(0)),
    # [E, ...] <-> [E + Z, ...]
    "padded": (
        lambda t, n: torch.cat((t, t.new_zeros(n.identity, *t.shape[1:]))),
        lambda t, n: t[: n.experts],
    ),
    # [n F, H] <-> [n, F, H], of the shared experts
    "apart": (lambda t, n: t.unflatten(0, (n.shared, -1)), lambda t, _: t.flatten(0, 1)),
    # [H, n F] <-> [n, H, F]
    "apart_columns": (
        lambda t, n: t.unflatten(1, (n.shared, -1)).transpose(0, 1),
        lambda t, _: t.transpose(0, 1).flatten(1, 2),
    ),
    # [2 n F, H], all gates above all ups <-> [n, 2F, H], gate, up, gate, up
    "apart_interleaved": (
        lambda t, n: t.unflatten(0, (2, n.shared, -1)).permute(1, 2, 0, 3).flatten(1, 2),
        lambda t, _: t.unflatten(1, (-1, 2)).permute(2, 0, 1, 3).flatten(0, 2),
    ),
}
