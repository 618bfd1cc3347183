"""Ids of a step on the only rank there is, and what may be read where none were captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSession, CaptureSpec, Rows
from moe_conformance.errors import Nonconformance, Unsupported

LAYERS, TOP_K, EXPERTS = 3, 3, 250


def spec_of(max_tokens: int, experts: int = EXPERTS, layers: int = LAYERS) -> CaptureSpec:
    return CaptureSpec(max_tokens=max_tokens, layers=layers, top_k=TOP_K, experts=experts)


def ids_of(step: int, tokens: int, layer: int) -> Tensor:
    """[tokens, K] int64 below 250; a row's ids differ, and so does each id from step to step, up to 5 steps."""
    return (torch.arange(tokens)[:, None] * 3 + torch.arange(TOP_K) * 17 + layer * 7 + step * 50) % EXPERTS


def record_of(step: int, tokens: int, layers: int = LAYERS) -> Tensor:
    """[tokens, L, K]"""
    return torch.stack([ids_of(step, tokens, layer) for layer in range(layers)], dim=1)


def capture(session: CaptureSession, layer: int, ids: Tensor) -> None:
    """On the only rank there is, every row is its own."""
    session.capture(layer, ids, Rows("local", (ids.shape[0],)))


def capture_step(session: CaptureSession, step: int, tokens: int, layers: tuple[int, ...] = (0, 1, 2)) -> None:
    for layer in layers:
        capture(session, layer, ids_of(step, tokens, layer))


def unreadable(what: str, read: Any, of: tuple[slice | int, ...]) -> None:
    """`read` must raise, or give negative ids at `of`: 0 and every other legal id would be taken for a record."""
    try:
        got = read()
    except Unsupported:
        raise
    except Exception:
        return
    shown = got[of]
    if (shown >= 0).any():
        raise Nonconformance(f"{what}: got ids {shown.flatten().tolist()[:8]}, want -1 or an error")


def ids_at_the_edges(experts: int) -> Tensor:
    """[n, L, K]: the lowest and highest ids, and those on both sides of 2^7, 2^8, 2^15 and 2^16."""
    edges = {0, 1, experts - 2, experts - 1, *(2**bits - side for bits in (7, 8, 15, 16) for side in (0, 1))}
    legal = torch.tensor(sorted(edge for edge in edges if edge < experts))
    places = torch.arange(len(legal))[:, None, None] + torch.arange(LAYERS)[:, None] + torch.arange(TOP_K)
    return legal[places % len(legal)]
