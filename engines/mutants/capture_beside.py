"""Capturers that know neither which model captures nor that experts have copies."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSession, CaptureSpec, Rows
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.capture import Capturer


class DraftClosesTheTarget(Faulty):
    """Capturers of one process share their memory, and the first that is closed releases it."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return _OneLife(spec)


class _OneLife(Capturer):
    open: ClassVar[list[Capturer]] = []

    def __init__(self, spec: CaptureSpec) -> None:
        super().__init__(spec)
        self.open.append(self)

    def close(self) -> None:
        released = [capturer for capturer in self.open if capturer.spec.max_tokens == self.spec.max_tokens]
        for capturer in released:
            self.open.remove(capturer)
            Capturer.close(capturer)


class _WithTable(Faulty):
    capturer: type[Capturer] = Capturer

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return self.capturer(spec)


class RecordsCopies(_WithTable):
    """vllm#33013: ids are captured behind the mapping to physical ones."""

    class capturer(Capturer):
        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            if rows.physical_to_logical is not None:
                ids = ids.clamp(max=self.spec.experts - 1)
            super().capture(layer_id, ids, replace(rows, physical_to_logical=None))


class TableOfTheFirstLayer(_WithTable):
    class capturer(Capturer):
        table: Tensor | None = None

        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            self.table = rows.physical_to_logical if layer_id == 0 else self.table
            super().capture(layer_id, ids, replace(rows, physical_to_logical=self.table))


class TableOfTheFirstStep(_WithTable):
    """A layer's table is kept where it was first seen; a rearrangement makes new ones."""

    class capturer(Capturer):
        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            self.tables: dict[int, Tensor | None] = {}

        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            table = self.tables.setdefault(layer_id, rows.physical_to_logical)
            super().capture(layer_id, ids, replace(rows, physical_to_logical=table))


class CopiesInAByte(_WithTable):
    """Physical ids are narrowed to what holds the experts before they are looked up."""

    class capturer(Capturer):
        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            if rows.physical_to_logical is not None and self.buffer.dtype == torch.uint8:
                ids = ids % 256
            super().capture(layer_id, ids, rows)


_DRAFT = "a_draft_model_leaves_the_target_alone"
_LOGICAL = "copies_are_recorded_as_their_experts"

MUTANTS = (
    Mutant(
        DraftClosesTheTarget,
        "capture-replay",
        "closing the draft's capturer closes the target's",
        ("capture-draft-closed-first", _DRAFT),
    ),
    Mutant(RecordsCopies, "eplb", "physical ids are recorded", ("capture-logical-one-table", _LOGICAL)),
    Mutant(
        TableOfTheFirstLayer,
        "eplb",
        "all layers take the first one's table",
        ("capture-logical-layers-differ", _LOGICAL),
    ),
    Mutant(
        TableOfTheFirstStep, "eplb", "tables are kept from before", ("capture-logical-moved-between-steps", _LOGICAL)
    ),
    Mutant(CopiesInAByte, "eplb", "physical ids are narrowed to a byte", ("capture-logical-beyond-a-byte", _LOGICAL)),
)
