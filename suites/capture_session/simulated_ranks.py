"""What each rank's router would hand to a capturer, computed in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSession, CaptureSpec, RowKind, Rows

# Ids are (row + 83 layer + 27 k) mod 251 with rows numbered through all ranks and padding, at most 83 of them: at one
# layer and k every row has its own id, a row's ids differ, and so do the layers of a row.
EXPERTS, LAYERS, TOP_K = 251, 3, 3


class SimulatedStep:
    """One step's ids on every rank. counts: tokens of each data-parallel rank. padding: the id in the rows that make
    slices whole, or None for ids that look like any other. behind: how many rows lie behind the valid ones, and their
    id, or None for legal ones; with an id, how many rows are valid is said even where none lie behind. counted: so many
    lie behind each rank's own instead, and count among its tokens."""

    def __init__(
        self,
        counts: Sequence[int],
        tp: int,
        padding: int | None = None,
        top_k: int = TOP_K,
        behind: tuple[int, int | None] = (0, None),
        counted: bool = False,
    ) -> None:
        self.counts, self.tp, self.padding, self.top_k = tuple(counts), tp, padding, top_k
        self.behind, self.told = behind, self.counts
        if counted:
            rows, self.padding = behind
            self.told, self.behind = tuple(count + rows for count in counts), (0, None)

    def spec(self, dp_rank: int, tp_rank: int = 0, layers: int = LAYERS) -> CaptureSpec:
        """A capturer with room for the largest rank's tokens and not for those of all."""
        return CaptureSpec(
            max_tokens=max(1, *self.told),
            layers=layers,
            top_k=self.top_k,
            experts=EXPERTS,
            dp_rank=dp_rank,
            dp_size=len(self.counts),
            tp_rank=tp_rank,
            tp_size=self.tp,
        )

    def own(self, dp_rank: int, layer: int) -> Tensor:
        """What must be recorded: [counts[dp_rank], K] int64."""
        return self._padded(dp_rank, layer)[: self.counts[dp_rank]]

    def want(self, dp_rank: int, layers: int = LAYERS) -> Tensor:
        """[counts[dp_rank], L, K], what `read` must give."""
        return torch.stack([self.own(dp_rank, layer) for layer in range(layers)], dim=1)

    def rows(self, kind: RowKind, dp_rank: int, tp_rank: int, layer: int) -> tuple[Tensor, Rows]:
        """The ids [rows, K] that arrive on this rank, and what the capturer is told about them."""
        ranks = range(len(self.counts))
        slices = self._padded(dp_rank, layer).chunk(self.tp) if self.told[dp_rank] else (self.own(dp_rank, layer),)
        if kind == "concatenated":
            ids = torch.cat([self._batch(rank, layer) for rank in ranks])
        elif kind == "local":
            ids = self._batch(dp_rank, layer)
        elif kind == "sequence_shard":
            ids = slices[tp_rank if self.told[dp_rank] else 0]
        else:
            ids = torch.cat([self._padded(rank, layer) for rank in ranks])
        # The other ranks of the group hold the same rows unless these are slices. Any layout has a gather: an
        # engine may find out only by the number of rows which one it is.
        parts = slices if kind == "sequence_shard" else (ids,) * self.tp
        padded = [self._with_rows_behind(part) for part in parts]
        valid_rows = ids.shape[0] if self.behind != (0, None) else None
        return self._with_rows_behind(ids), Rows(kind, self.told, _gather(parts, padded), valid_rows)

    def _with_rows_behind(self, ids: Tensor) -> Tensor:
        rows, expert = self.behind
        legal = (torch.arange(rows)[:, None] * 5 + torch.arange(self.top_k) * 11 + 2) % EXPERTS
        return torch.cat([ids, legal if expert is None else torch.full_like(legal, expert)])

    def _batch(self, dp_rank: int, layer: int) -> Tensor:
        """One data-parallel rank's rows, with the padding that counts among its tokens."""
        return self._padded(dp_rank, layer)[: self.told[dp_rank]]

    def _padded(self, dp_rank: int, layer: int) -> Tensor:
        """One data-parallel rank's rows with the padding that makes them whole slices: [tp ceil(count / tp), K]."""
        sizes = [-(-count // self.tp) * self.tp for count in self.told]
        row = torch.arange(sizes[dp_rank])[:, None] + sum(sizes[:dp_rank])
        ids = (row + 83 * layer + 27 * torch.arange(self.top_k)) % EXPERTS
        if self.padding is not None:
            ids[self.counts[dp_rank] :] = self.padding
        return ids


def _gather(parts: Sequence[Tensor], padded: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """All ranks' rows, with the padding behind them if the engine gathers before it cuts that off."""

    def gather(ids: Tensor) -> Tensor:
        cut = ids.shape[0] == parts[0].shape[0]
        return torch.cat([part.to(ids) for part in (parts if cut else padded)])

    return gather


def capture_step(session: CaptureSession, step: SimulatedStep, kind: RowKind, dp_rank: int, tp_rank: int = 0) -> None:
    """Capture every layer of a step in one layout."""
    for layer in range(LAYERS):
        session.capture(layer, *step.rows(kind, dp_rank, tp_rank, layer))
