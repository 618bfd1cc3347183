"""Capturers that take the wrong rows for their own."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_conformance.engine import CaptureSession, CaptureSpec, Rows
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.capture import Capturer, row_counts


class _SeesOtherRows(Faulty):
    """A reference whose capturer is told something else about the rows than what is true."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return _Misled(spec, self)

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        raise NotImplementedError


class _Misled(Capturer):
    def __init__(self, spec: CaptureSpec, mutant: _SeesOtherRows) -> None:
        super().__init__(spec)
        self.mutant = mutant

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        super().capture(layer_id, *self.mutant.mislead(ids, rows, self.spec))


def _only(ids: Tensor, start: int, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
    """The rows from `start` on, as many as this rank owns, passed on as its own."""
    own = rows.counts[spec.dp_rank]
    return ids[start : start + own], replace(rows, kind="local")


class AssumesConcatenated(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        return ids, replace(rows, kind="concatenated")


class TakesFirstRanksRows(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        right = row_counts(rows.counts, spec.dp_rank, spec.tp_size)["concatenated"] == ids.shape[0]
        return _only(ids, 0, rows, spec) if rows.kind == "concatenated" and right else (ids, rows)


class AssumesEqualCounts(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.kind != "concatenated" or ids.shape[0] != sum(rows.counts):
            return ids, rows
        return _only(ids, spec.dp_rank * rows.counts[spec.dp_rank], rows, spec)


class CountsOneRankTooFew(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.kind != "concatenated" or ids.shape[0] != sum(rows.counts) or spec.dp_rank < 2:
            return ids, rows
        return _only(ids, sum(rows.counts[: spec.dp_rank - 1]), rows, spec)


class CountsPaddingAsRows(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        right = row_counts(rows.counts, spec.dp_rank, spec.tp_size)["sequence_gathered"] == ids.shape[0]
        if rows.kind != "sequence_gathered" or not right:
            return ids, rows
        return _only(ids, sum(rows.counts[: spec.dp_rank]), rows, spec)


class KeepsOwnSliceOnly(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        return ids, replace(rows, gather=lambda part: part.repeat(spec.tp_size, 1))


class AcceptsAnyCount(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        want = row_counts(rows.counts, spec.dp_rank, spec.tp_size)[rows.kind]
        if ids.shape[0] > want:
            return ids[:want], rows
        return ids, rows


class RefusesWithoutNumbers(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if ids.shape[0] != row_counts(rows.counts, spec.dp_rank, spec.tp_size)[rows.kind]:
            raise InputError("ids: unexpected number of rows")
        return ids, rows


class WritesBeforeItRefuses(_SeesOtherRows):
    """The rows are counted behind the loop that writes them."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return _Eager(spec, self)

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        return ids, rows


class _Eager(_Misled):
    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        try:
            super().capture(layer_id, ids, rows)
        except InputError:
            own = min(len(ids), rows.counts[self.spec.dp_rank])
            if 0 <= layer_id < self.spec.layers:
                self.buffer[:own, layer_id] = ids[:own].to(self.buffer.dtype)
            raise


class KeepsFirstStepsStart(_SeesOtherRows):
    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        self.start: int | None = None
        return super().capture_session(spec)

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.kind != "concatenated" or ids.shape[0] != sum(rows.counts):
            return ids, rows
        if self.start is None:
            self.start = sum(rows.counts[: spec.dp_rank])
        return _only(ids, self.start, rows, spec)


class KeepsStartWhileOwnCountLasts(_SeesOtherRows):
    """As a graph captured for this rank's batch size would, whatever the other ranks have since."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        self.starts: dict[int, int] = {}
        return super().capture_session(spec)

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.kind != "concatenated" or ids.shape[0] != sum(rows.counts):
            return ids, rows
        start = self.starts.setdefault(rows.counts[spec.dp_rank], sum(rows.counts[: spec.dp_rank]))
        return _only(ids, min(start, ids.shape[0] - rows.counts[spec.dp_rank]), rows, spec)


class IdleRankTakesAnySlices(_SeesOtherRows):
    """The count is checked where rows are kept: a rank without tokens keeps none."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        idle = rows.kind.startswith("sequence") and not rows.counts[spec.dp_rank]
        return _only(ids, 0, rows, spec) if idle else (ids, rows)


class PaddingMakesUpForRows(_SeesOtherRows):
    """The number of valid rows is not looked at."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        want = row_counts(rows.counts, spec.dp_rank, spec.tp_size)[rows.kind]
        cut = rows.valid_rows is not None and ids.shape[0] >= want
        return (ids[:want], replace(rows, valid_rows=None)) if cut else (ids, rows)


class TakesTheLastRows(_SeesOtherRows):
    """Padding is taken to lie in front."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        return (ids, rows) if rows.valid_rows is None else (ids.flip(0)[: rows.valid_rows].flip(0), rows)


class GathersPaddedSlices(_SeesOtherRows):
    """Slices are gathered with the padding behind them, and the first rows taken."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.kind != "sequence_shard" or rows.valid_rows is None or rows.gather is None:
            return ids, rows
        if rows.valid_rows != row_counts(rows.counts, spec.dp_rank, spec.tp_size)[rows.kind]:
            return ids, rows
        return _only(rows.gather(ids), 0, replace(rows, valid_rows=None), spec)


class ChecksIdsOfPadding(_SeesOtherRows):
    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        if rows.valid_rows is not None and ((ids < 0) | (ids >= spec.experts)).any():
            raise InputError("ids: got an id outside [0, experts)")
        return ids, rows


class PaddingIsKept(_SeesOtherRows):
    """Padding rows are recorded as further tokens of this rank where there is room for them."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        fits = spec.dp_size == 1 and rows.kind in ("local", "concatenated") and ids.shape[0] <= spec.max_tokens
        if rows.valid_rows is None or not fits:
            return ids, rows
        return ids, replace(rows, counts=(ids.shape[0],), valid_rows=None)


class FirstLayersLayout(Faulty):
    """The layout of a step is that of its first layer."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return _FirstLayout(spec)


class _FirstLayout(Capturer):
    first: Rows | None = None

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        if layer_id == 0 or self.first is None or ids.shape[0] == 0:
            self.first = rows
        fits = row_counts(rows.counts, self.spec.dp_rank, self.spec.tp_size)[rows.kind] == ids.shape[0]
        kind = self.first.kind if fits and self.first.counts == rows.counts else rows.kind
        super().capture(layer_id, ids, replace(rows, kind=kind, gather=rows.gather or self.first.gather))


class SmallStepsBackwards(_SeesOtherRows):
    """The path for a few tokens writes them last to first."""

    def mislead(self, ids: Tensor, rows: Rows, spec: CaptureSpec) -> tuple[Tensor, Rows]:
        return ids.flip(0) if rows.kind == "local" and len(ids) <= 3 else ids, rows


def _mutant(engine: type[Faulty], fault: str, case: str, check: str, *also: str) -> Mutant:
    return Mutant(engine, "dp-assertions", fault, (case, check), frozenset(also))


_OWN, _REFUSED = "every_rank_records_its_own_rows", "wrong_row_counts_are_refused_by_number"

MUTANTS = (
    _mutant(
        AssumesConcatenated,
        "refuses every layout but the concatenated one (vllm#37879)",
        "capture-local-tp1-dp2-fewer-first",
        _OWN,
    ),
    _mutant(
        TakesFirstRanksRows,
        "takes the first rows of concatenated ids on every rank",
        "capture-concatenated-tp1-dp2-fewer-first",
        _OWN,
    ),
    _mutant(
        AssumesEqualCounts,
        "multiplies its own count by its rank to find its rows",
        "capture-concatenated-tp1-dp2-fewer-first",
        _OWN,
    ),
    _mutant(
        CountsOneRankTooFew,
        "stops the running sum of counts one rank early",
        "capture-concatenated-tp1-dp4-unequal",
        _OWN,
    ),
    _mutant(
        CountsPaddingAsRows,
        "skips the rows of the ranks before in gathered slices, but not their padding",
        "capture-sequence-gathered-tp2-dp2-fewer-first",
        _OWN,
    ),
    _mutant(
        KeepsOwnSliceOnly,
        "repeats its own slice instead of gathering the others'",
        "capture-sequence-shard-tp2-dp2-fewer-first",
        _OWN,
    ),
    _mutant(
        KeepsFirstStepsStart,
        "keeps the first step's start of its rows",
        "capture-concatenated-counts-change",
        "counts_may_change_between_steps",
    ),
    _mutant(
        KeepsStartWhileOwnCountLasts,
        "keeps the start of its rows until its own count changes",
        "capture-concatenated-other-counts-change",
        "counts_may_change_between_steps",
    ),
    _mutant(
        IdleRankTakesAnySlices,
        "takes any number of slices' rows on a rank without tokens",
        "capture-sequence-gathered-wrong-count-no-tokens",
        _REFUSED,
    ),
    _mutant(
        AcceptsAnyCount,
        "cuts surplus rows off without a word",
        "capture-local-wrong-count-rank1",
        _REFUSED,
    ),
    _mutant(
        WritesBeforeItRefuses,
        "writes the rows that it then refuses",
        "capture-local-wrong-count-rank1",
        _REFUSED,
    ),
    _mutant(
        PaddingMakesUpForRows,
        "takes padding rows for those that are missing",
        "capture-local-wrong-valid-count",
        _REFUSED,
    ),
    _mutant(TakesTheLastRows, "takes padding to lie in front", "capture-local-padding-rows-legal", _OWN),
    _mutant(
        GathersPaddedSlices,
        "gathers slices with the padding behind them",
        "capture-sequence-shard-padding-rows-legal",
        _OWN,
    ),
    _mutant(ChecksIdsOfPadding, "refuses ids of padding rows", "capture-concatenated-padding-rows-garbage", _OWN),
    _mutant(
        PaddingIsKept,
        "keeps padding rows as tokens",
        "capture-local-padding-rows-unreadable",
        "padding_rows_are_never_readable",
    ),
    _mutant(
        RefusesWithoutNumbers,
        "refuses a row count without saying which",
        "capture-concatenated-wrong-count-named",
        _REFUSED,
    ),
    _mutant(
        FirstLayersLayout,
        "takes the first layer's layout for all",
        "capture-layout-changes-whole",
        "layout_may_change_between_layers",
    ),
    _mutant(
        SmallStepsBackwards,
        "turns a small step round",
        "capture-local-spelled-out",
        "record_of_a_small_step",
        "capture-replay",
    ),
)
