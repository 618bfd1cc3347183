"""Ids of a step on the only rank there is, and what may be read where none were captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSpec, Engine, RowKind, Rows
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare

LAYERS, TOP_K, EXPERTS = 3, 3, 250
KINDS: tuple[RowKind, ...] = ("local", "concatenated", "sequence_shard", "sequence_gathered")


def spec_of(max_tokens: int, experts: int = EXPERTS, layers: int = LAYERS, top_k: int = TOP_K) -> CaptureSpec:
    return CaptureSpec(max_tokens=max_tokens, layers=layers, top_k=top_k, experts=experts)


def ids_of(step: int, tokens: int, layer: int) -> Tensor:
    """[tokens, K] int64 below 250; a row's ids differ, and so does each id from step to step, up to 5 steps."""
    return (torch.arange(tokens)[:, None] * 3 + torch.arange(TOP_K) * 17 + layer * 7 + step * 50) % EXPERTS


def record_of(step: int, tokens: int, layers: int = LAYERS) -> Tensor:
    """[tokens, L, K]"""
    return torch.stack([ids_of(step, tokens, layer) for layer in range(layers)], dim=1)


class OnlyRank:
    """A session on the only rank there is, where every row is its own and all layouts are the same.

    Rows are said to be in whichever layout the engine offers.
    """

    def __init__(self, engine: Engine, spec: CaptureSpec) -> None:
        offered = engine.capabilities()["capture_session"]
        self.kind = next((kind for kind in KINDS if kind in offered), None)
        if self.kind is None:
            raise Unsupported(f"capture_session: got no layout, want one of {', '.join(KINDS)}")
        self.session = engine.capture_session(spec)

    def capture(self, layer: int, ids: Tensor) -> None:
        assert self.kind is not None
        self.session.capture(layer, ids, Rows(self.kind, (ids.shape[0],), gather=lambda rows: rows))

    def capture_step(self, step: int, tokens: int, layers: tuple[int, ...] = (0, 1, 2)) -> None:
        for layer in layers:
            self.capture(layer, ids_of(step, tokens, layer))

    def read(self, num_tokens: int) -> Tensor:
        return self.session.read(num_tokens)

    def close(self) -> None:
        self.session.close()


def unreadable(what: str, read: Any, of: tuple[slice | int, ...], experts: int = EXPERTS) -> None:
    """`read` must raise, or give at `of` negative ids, or one number that names no expert.

    The latter is what stands for -1 where ids are stored unsigned: all bits set. 0 and every other legal id would be
    taken for a record, and several numbers are what memory held before.
    """
    try:
        got = read()
    except Unsupported:
        raise
    except Exception:
        return
    shape = got.shape if isinstance(got, Tensor) else ()
    shown = compare.numbers(what, got, shape, integer=True)[of].flatten().long()
    says_none = (shown < 0).all() or ((shown >= experts).all() and len(shown.unique()) == 1)
    if not says_none:
        raise Nonconformance(
            f"{what}: got ids {shown.tolist()[:8]}, want -1, one number that names no expert, or an error"
        )


def ids_at_the_edges(experts: int) -> Tensor:
    """[n, L, K]: the lowest and highest ids, and those on both sides of 2^7 to 2^10, 2^15 and 2^16."""
    edges = {0, 1, experts - 2, experts - 1, *(2**bits - side for bits in (7, 8, 9, 10, 15, 16) for side in (0, 1))}
    legal = torch.tensor(sorted(edge for edge in edges if edge < experts))
    places = torch.arange(len(legal))[:, None, None] + torch.arange(LAYERS)[:, None] + torch.arange(TOP_K)
    return legal[places % len(legal)]


def every_id(experts: int, top_k: int) -> Tensor:
    """[n, L, K]: all ids in turn, each layer from another one on; those of a row differ."""
    row = torch.arange(-(-experts // top_k))[:, None, None] * top_k
    return (row + 300 * torch.arange(LAYERS)[:, None] + torch.arange(top_k)) % experts


def refused_or_kept(engine: Engine, stage: str, what: str, write_and_read: Callable[[], Tensor], given: Tensor) -> None:
    """An engine that declares no bounds may also give the ids back as they came."""
    if "expert_bounds" in engine.capabilities()[stage]:
        compare.refused(what, write_and_read)
        return
    try:
        got = write_and_read()
    except Unsupported:
        raise
    except Exception:
        return
    compare.equal(f"{what}, which was neither refused nor kept", got, given)
