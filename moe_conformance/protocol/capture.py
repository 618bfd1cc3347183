"""Capture of routed experts: the device side (`capture_session`) and the host side (`capture_store`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

RowKind = Literal["concatenated", "local", "sequence_shard", "sequence_gathered"]


@dataclass(frozen=True)
class Rows:
    """Which rows an ids tensor holds.

    counts: tokens of each data-parallel rank in this step.
    kind: "concatenated", all ranks' rows in rank order; "local", this rank's rows; "sequence_shard", this
    tensor-parallel rank's slice of the local rows, each slice ceil(count / tp) rows, the last ones padding;
    "sequence_gathered", every rank's slices with their padding, data-parallel rank major, then tensor-parallel.
    gather: the engine's all-gather, given in every layout; for "sequence_shard" it concatenates every tensor-parallel
    rank's slice along dim 0 in rank order.
    valid_rows: how many leading rows of ids belong to the layout; the rest are padding with arbitrary ids (a batch
    padded to the size of a CUDA graph). None: all rows.
    physical_to_logical: [P] integer, the expert that each physical one is a copy of, at this layer and now, where ids
    come as physical ones (EPLB); what is recorded is the expert. None: ids are those of experts.
    """

    kind: RowKind
    counts: tuple[int, ...]
    gather: Callable[[Tensor], Tensor] | None = None
    valid_rows: int | None = None
    physical_to_logical: Tensor | None = None


@dataclass(frozen=True)
class CaptureSpec:
    """The capturer to build: buffer sizes and this process's place among the ranks."""

    max_tokens: int
    layers: int
    top_k: int
    experts: int
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1


class CaptureSession(Protocol):
    """A routed-experts capturer.

    `capture` gets ids [rows, K] of one layer, each layer at most once a step. `read` gives ids [n, L, K] of this rank's
    n tokens of the last step and ends it; what a layer that routed nothing reads as is the engine's affair, unless it
    offers "unwritten".
    """

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None: ...

    def read(self, num_tokens: int) -> Tensor: ...

    def close(self) -> None: ...


class CaptureStore(Protocol):
    """The host side: rows kept by slot, read from another process through the picklable `address`."""

    @property
    def address(self) -> object: ...

    def write(self, slots: Sequence[int], rows: Tensor) -> None: ...

    def close(self) -> None: ...


class CaptureReader(Protocol):
    def read(self, slots: Sequence[int]) -> Tensor: ...

    def close(self) -> None: ...
