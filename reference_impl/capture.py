"""Recording the experts that routing chose, for the tokens this rank owns, whichever row layout arrives.

Written so that a step can be recorded in a CUDA graph and replayed: what changes from step to step lives in device
tensors, and only `read` waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import CaptureShape, CaptureSpec, RowKind, Rows
from moe_conformance.errors import InputError

UNWRITTEN = -1  # what is read where nothing was captured; zero is a legal expert id


def capture_shape(config: Any) -> CaptureShape:
    """The buffer sizes of a model, the same for every side of the capturer. See `config.capture_shape`."""
    from moe_conformance.model.families import describe as stage

    return stage.capture_shape(config)


def storage_dtype(experts: int) -> torch.dtype:
    """The narrowest dtype that holds every id of `experts` experts, and all bits set: unwritten."""
    if experts <= 255:
        return torch.uint8
    return torch.int16 if experts <= 2**15 else torch.int32


def widen(stored: Tensor) -> Tensor:
    """Ids in a storage dtype -> int32, UNWRITTEN where nothing was written."""
    unwritten = torch.full((), UNWRITTEN).to(stored.dtype)  # 255 in uint8
    return torch.where(stored == unwritten.to(stored.device), UNWRITTEN, stored.int())


def row_counts(counts: tuple[int, ...], dp_rank: int, tp_size: int) -> dict[RowKind, int]:
    """How many rows an ids tensor has in each layout, on one data-parallel rank.

    counts (3, 5), dp_rank 1, tp_size 2: concatenated 8, local 5, sequence_shard 3, sequence_gathered 4 + 6.
    """
    shards = [-(-count // tp_size) for count in counts]
    return {
        "concatenated": sum(counts),
        "local": counts[dp_rank],
        "sequence_shard": shards[dp_rank],
        "sequence_gathered": sum(shards) * tp_size,
    }


def local_rows(ids: Tensor, rows: Rows, spec: CaptureSpec) -> Tensor:
    """The rows of the tokens that this data-parallel rank owns: [counts[dp_rank], K], a view where no gather is needed.

    ids: [rows, K] in the layout of `rows`; rows from rows.valid_rows on are padding, which is cut off first. Depends on
    sizes only, never on what ids holds.
    Raises InputError if ids has another number of rows, or `rows` does not fit `spec`.
    """
    if rows.valid_rows is not None:
        if not 0 <= rows.valid_rows <= ids.shape[0]:
            raise InputError(f"rows.valid_rows: got {rows.valid_rows}, want 0 to {ids.shape[0]}, the rows of ids")
        ids = ids[: rows.valid_rows]
    if len(rows.counts) != spec.dp_size or min(rows.counts) < 0:
        raise InputError(f"rows.counts: got {rows.counts}, want {spec.dp_size} counts, one a data-parallel rank, >= 0")
    counts = row_counts(rows.counts, spec.dp_rank, spec.tp_size)
    if rows.kind not in counts:
        raise InputError(f"rows.kind: got {rows.kind!r}, want one of {', '.join(counts)}")
    if ids.shape[0] != counts[rows.kind]:
        others = ", ".join(f"{kind} {count}" for kind, count in counts.items() if kind != rows.kind)
        raise InputError(
            f"ids: got {ids.shape[0]} rows, want {counts[rows.kind]} for layout {rows.kind} (others: {others}); "
            f"data-parallel rank {spec.dp_rank}, counts {rows.counts}, tensor-parallel size {spec.tp_size}"
        )
    before, own = rows.counts[: spec.dp_rank], rows.counts[spec.dp_rank]
    start = 0
    if rows.kind == "concatenated":
        start = sum(before)
    elif rows.kind == "sequence_gathered":
        start = sum(-(-count // spec.tp_size) * spec.tp_size for count in before)
    elif rows.kind == "sequence_shard":
        if rows.gather is None:
            raise InputError("rows.gather: got None, want the all-gather of the tensor-parallel ranks' slices")
        want = ids.shape[0] * spec.tp_size
        ids = rows.gather(ids)
        if ids.shape[0] != want:
            raise InputError(f"rows.gather: got {ids.shape[0]} rows, want {want}, {spec.tp_size} slices")
    return ids[start : start + own]


def logical(ids: Tensor, physical_to_logical: Tensor | None) -> Tensor:
    """ids [n, K] of physical experts -> of the experts that they are copies of, -1 where there is no such copy.

    Reads the table, not a copy of it, so that a balancer may rewrite it between two replays of a graph.
    """
    if physical_to_logical is None:
        return ids
    table = physical_to_logical.to(ids.device)
    legal = (ids >= 0) & (ids < len(table))
    return torch.where(legal, table[ids.where(legal, 0)].to(ids.dtype), -1)


def capture(ids: Tensor, start: int, count: int, buffer: Tensor, layer_id: int, experts: int, rejected: Tensor) -> None:
    """buffer[:count, layer_id] = ids[start : start + count], or nothing at all if one of these ids is no expert.

    ids: [rows, K] int32 or int64, any strides. buffer: [tokens, L, K], an integer dtype that holds `experts` - 1.
    rejected: [L] int32, 0 if nothing is wrong. A bad id stores 1 + its row there, and the layer records nothing more
    until `raise_rejected` has read it. Never waits for the device.
    Raises InputError for shapes, dtypes, rows or a layer id out of range.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids: got {ids.dtype} {list(ids.shape)}, want int32 or int64 [rows, K]")
    if ids.shape[1] != buffer.shape[2]:
        raise InputError(f"ids: got {ids.shape[1]} experts a token, want {buffer.shape[2]}, the buffer's")
    if not 0 <= layer_id < buffer.shape[1]:
        raise InputError(f"layer_id: got {layer_id}, want 0 to {buffer.shape[1] - 1}, the buffer's layers")
    if start < 0 or not 0 <= count <= min(ids.shape[0] - start, buffer.shape[0]):
        raise InputError(
            f"rows: got {start} to {start + count}, want a range within the {ids.shape[0]} rows of ids, "
            f"of at most {buffer.shape[0]} rows, which the buffer holds"
        )
    if not count:
        return
    own, kept, flag = ids[start : start + count], buffer[:count, layer_id], rejected[layer_id]
    bad = ((own < 0) | (own >= experts)).any(dim=1)  # [count]
    bad_row = torch.where(bad, torch.arange(1, count + 1, device=ids.device), 0).amax()
    flag.copy_(torch.maximum(flag, bad_row))
    kept.copy_(torch.where(flag == 0, own.to(buffer.dtype), kept))


def raise_rejected(rejected: Tensor) -> None:
    """Wait for the device; raise InputError naming the layers that refused ids since the last call, and clear them."""
    rows = rejected.tolist()
    if any(rows):
        rejected.zero_()
        found = ", ".join(f"layer {layer} row {row - 1}" for layer, row in enumerate(rows) if row)
        raise InputError(
            f"ids: got an id outside [0, E) at {found}, want experts alone; nothing of these layers was recorded"
        )


class Capturer:
    """Keeps the expert ids of one step: a `CaptureSession`.

    A step begins with the first capture, and again whenever a layer is captured a second time or the number of
    own rows changes. Ids of an earlier step are not readable: `read` refuses rows that this step did not have, and
    gives UNWRITTEN for layers it did not capture.
    """

    write = staticmethod(capture)  # an engine with a kernel for it has its own

    def __init__(self, spec: CaptureSpec, device: str = "cpu") -> None:
        if not (0 <= spec.dp_rank < spec.dp_size and 0 <= spec.tp_rank < spec.tp_size):
            raise InputError(f"CaptureSpec: got {spec}, want each rank below its size")
        self.spec = spec
        shape = (spec.max_tokens, spec.layers, spec.top_k)
        self.buffer = torch.full(shape, UNWRITTEN, device=device).to(storage_dtype(spec.experts))
        self.rejected = torch.zeros(spec.layers, dtype=torch.int32, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.rows_in_step = torch.zeros((), dtype=torch.int64, device=device)
        self.step_of_layer = torch.full((spec.layers,), -1, dtype=torch.int64, device=device)

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        """Record one layer's ids of this step.

        ids: [rows, K] int32 or int64, left unchanged. Ids outside [0, E) record nothing and make `read` raise.
        Raises InputError, with nothing changed, for a row count that does not fit or a layer id out of range.
        """
        own = logical(local_rows(ids, rows, self.spec), rows.physical_to_logical).to(self.buffer.device)
        self.write(own, 0, own.shape[0], self.buffer, layer_id, self.spec.experts, self.rejected)
        self._mark(layer_id, own.shape[0])

    def _mark(self, layer_id: int, count: int) -> None:
        """Mark the layer as captured in this step, on the device; begin a new step if it was captured already."""
        last = self.step_of_layer[layer_id]
        self.step += (last == self.step) | (self.rows_in_step != count)
        self.rows_in_step.fill_(count)
        last.copy_(torch.where(self.rejected[layer_id] == 0, self.step, -1))

    def read(self, num_tokens: int) -> Tensor:
        """The first rows of the last step: [num_tokens, L, K] int32, UNWRITTEN in layers that it did not capture.

        Raises InputError for more rows than the step has, or if ids out of range were captured since the last read.
        """
        raise_rejected(self.rejected)
        rows = int(self.rows_in_step)
        if not 0 <= num_tokens <= rows:
            raise InputError(f"num_tokens: got {num_tokens}, want 0 to {rows}, the rows of the last step")
        captured = (self.step_of_layer == self.step)[:, None]  # [L, 1]
        return torch.where(captured, widen(self.buffer[:num_tokens]), UNWRITTEN)

    def close(self) -> None:
        """Release the buffer; nothing can be captured or read afterwards."""
        self.buffer, self.rejected = self.buffer[:0, :0], self.rejected[:0]
        self.rows_in_step.fill_(-1)
