"""Capturers, stores and readers that give back other ids than were captured."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import CaptureReader, CaptureSession, CaptureSpec, CaptureStore, Rows
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.errors import InputError
from moe_conformance.reference_impl import store as store_stage
from moe_conformance.reference_impl.capture import Capturer, capture
from moe_conformance.reference_impl.store import HostReader, HostStore, StoreAddress, _remove


class _WithParts(Faulty):
    """The reference with another capturer, store or reader."""

    session: type[Capturer] = Capturer
    store: type[HostStore] = HostStore
    reader: type[HostReader] = HostReader

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return self.session(spec)

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        return self.store(spec)

    def capture_reader(self, address: Any) -> CaptureReader:
        return self.reader(address)


# Sessions ---------------------------------------------------------------------------------------------------------


class NegativeLayerWraps(_WithParts):
    class session(Capturer):
        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            wraps = -self.spec.layers <= layer_id < 0
            super().capture(layer_id + self.spec.layers if wraps else layer_id, ids, rows)


class IgnoresLayersPastTheEnd(_WithParts):
    class session(Capturer):
        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            if layer_id < self.spec.layers:
                super().capture(layer_id, ids, rows)


class NarrowsTo8Bits(_WithParts):
    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids % 256, *where)


class NarrowsTo16Bits(_WithParts):
    class session(Capturer):
        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            if self.buffer.dtype == torch.int32:
                self.buffer = self.buffer.short()


class StoresBfloat16(_WithParts):
    """Ids are kept as bfloat16, in which 894 is 896."""

    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, start: int, count: int, buffer: Tensor, layer: int, experts: int, flag: Tensor) -> None:
            capture(ids.bfloat16().to(ids.dtype).clamp(max=experts - 1), start, count, buffer, layer, experts, flag)


class NarrowsTo9Bits(_WithParts):
    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids % 512, *where)


class MinusOneIsAByte(_WithParts):
    """An id of -1 is kept, as 255 in a byte."""

    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids.masked_fill(ids == -1, 255), *where)


class CountsTheLayersThatRoute(_WithParts):
    """The n-th capture of a step is taken for layer n."""

    class session(Capturer):
        seen: tuple[int, ...] = ()

        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            legal = 0 <= layer_id < self.spec.layers
            if self.seen and layer_id <= self.seen[-1]:
                self.seen = ()
            self.seen = (*self.seen, layer_id)
            super().capture(len(self.seen) - 1 if legal else layer_id, ids, rows)


class RefusesHalfSteps(_WithParts):
    """A step is complete when each layer was captured."""

    class session(Capturer):
        def read(self, num_tokens: int) -> Tensor:
            rows = super().read(num_tokens)
            if not (self.step_of_layer == self.step).all():
                raise InputError("a layer of this step is missing")
            return rows


class WaitsForLayerZero(_WithParts):
    """Buffers are made at the first capture of layer 0; before that there is nowhere to write."""

    class session(Capturer):
        begun = False

        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            self.begun = self.begun or layer_id == 0
            if self.begun or not 0 <= layer_id < self.spec.layers:
                super().capture(layer_id, ids, rows)

        def read(self, num_tokens: int) -> Tensor:
            if self.begun:
                return super().read(num_tokens)
            return torch.full((num_tokens, self.spec.layers, self.spec.top_k), -1)


class NegativeIdsAreExpertZero(_WithParts):
    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids.clamp(min=0), *where)


class LayerZeroBeginsTheStep(_WithParts):
    """A model whose first layer is dense never captures layer 0."""

    class session(Capturer):
        def _mark(self, layer_id: int, count: int) -> None:
            self.step += layer_id == 0
            self.rows_in_step.fill_(count)
            self.step_of_layer[layer_id] = torch.where(self.rejected[layer_id] == 0, self.step, -1)


class ChecksIdsAfterNarrowing(_WithParts):
    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids.int(), *where)


class IgnoresShrunkSteps(_WithParts):
    class session(Capturer):
        def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
            if rows.counts[self.spec.dp_rank] >= int(self.rows_in_step):
                super().capture(layer_id, ids, rows)


class ReadsOnce(_WithParts):
    class session(Capturer):
        def read(self, num_tokens: int) -> Tensor:
            kept: dict[int, Tensor] = self.__dict__.setdefault("kept", {})
            return kept.setdefault(num_tokens, super().read(num_tokens))


class ReadsAnyRow(_WithParts):
    class session(Capturer):
        def read(self, num_tokens: int) -> Tensor:
            self.rows_in_step.fill_(self.spec.max_tokens)
            return super().read(num_tokens)


class KeepsEarlierLayers(_WithParts):
    class session(Capturer):
        def read(self, num_tokens: int) -> Tensor:
            self.step_of_layer[self.step_of_layer >= 0] = self.step
            return super().read(num_tokens)


class ZeroForUnwrittenLayers(_WithParts):
    class session(Capturer):
        def read(self, num_tokens: int) -> Tensor:
            return super().read(num_tokens).clamp(min=0)


class CopiesTooLate(_WithParts):
    class session(Capturer):
        def write(self, *arguments: Any) -> None:
            capture(*arguments)
            self.__dict__.setdefault("late", []).append(arguments)

        def read(self, num_tokens: int) -> Tensor:
            for arguments in self.__dict__.pop("late", []):
                capture(*arguments)
            return super().read(num_tokens)


class IgnoresStrides(_WithParts):
    class session(Capturer):
        @staticmethod
        def write(ids: Tensor, *where: Any) -> None:
            capture(ids.as_strided(ids.shape, (ids.shape[1], 1)), *where)


class OneBufferForAll(_WithParts):
    def __init__(self) -> None:
        self.buffers: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        session = Capturer(spec)
        _, layers, top_k = session.buffer.shape
        key = layers, top_k, session.buffer.dtype
        session.buffer = self.buffers.setdefault(key, session.buffer.new_full((512, layers, top_k), 0))
        return session


class DraftWritesToTheModels(_WithParts):
    """vllm#48622: a draft model's router has the number of the model's first layer, and writes to its place."""

    def __init__(self) -> None:
        self.first: Capturer | None = None

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        session = Capturer(spec)
        if self.first is None or self.first.spec.layers <= spec.layers:
            self.first = session
        else:
            session.buffer = self.first.buffer[: spec.max_tokens]
        return session


# Stores -----------------------------------------------------------------------------------------------------------


class NegativeSlotWraps(_WithParts):
    class reader(HostReader):
        def read(self, slots: Sequence[int]) -> Tensor:
            size = self.address.shape[0]
            return super().read([slot + size if -size <= slot < 0 else slot for slot in slots])


class StoresBytes(_WithParts):
    class store(HostStore):
        def write(self, slots: Sequence[int], rows: Tensor) -> None:
            super().write(slots, torch.where(rows < 0, rows, rows % 256))


class NoneIsTheLastOf256(_WithParts):
    """256 experts fill a byte, in which -1 is the last of them."""

    class store(HostStore):
        def write(self, slots: Sequence[int], rows: Tensor) -> None:
            super().write(slots, rows % 256 if self.experts == 256 else rows)


class StoreFilledWithZeros(_WithParts):
    class store(HostStore):
        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            self.write(range(spec.max_tokens), torch.zeros(self.address.shape, dtype=torch.int32))


class WritesFromTheFirstSlotOn(_WithParts):
    class store(HostStore):
        def write(self, slots: Sequence[int], rows: Tensor) -> None:
            super().write([(slots[0] + i) % self.address.shape[0] for i in range(len(slots))], rows)


class ReadsInSlotOrder(_WithParts):
    class reader(HostReader):
        def read(self, slots: Sequence[int]) -> Tensor:
            return super().read(sorted(slots))


class ReaderTakesMemoryAlong(_WithParts):
    def capture_reader(self, address: Any) -> CaptureReader:
        with patch.object(store_stage, "_attach", SharedMemory):
            return HostReader(address)


class StoreTakesTheFirstIdBeyond(_WithParts):
    class store(HostStore):
        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            self.experts += 1


class WritesLayersWithoutLock(_WithParts):
    class store(HostStore):
        def write(self, slots: Sequence[int], rows: Tensor) -> None:
            store_stage._slot_index(slots, self.address.shape[0])
            held = store_stage._rows(self._segment, self.address)
            for slot, row in zip(slots, rows.numpy(), strict=True):
                for layer, ids in enumerate(row):
                    held[slot, layer] = ids


class KeepsReadersOpen(_WithParts):
    class reader(HostReader):
        def close(self) -> None:
            pass

    def __init__(self) -> None:
        self.readers: dict[Any, HostReader] = {}

    def capture_reader(self, address: Any) -> CaptureReader:
        if address not in self.readers:
            self.readers[address] = self.reader(address)
        return self.readers[address]


class OneSegmentForAll(_WithParts):
    """The stores of a process share a segment, as those named by its id alone would."""

    class store(HostStore):
        kept: ClassVar[list[HostStore]] = []

        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            first = next(
                (one for one in self.kept if one._removal.alive and one.address.shape == self.address.shape), self
            )
            self.address, self._segment = first.address, first._segment
            self.kept[:] = [first]


class OutlivesItsOwner(_WithParts):
    """Nobody removes the memory of an owner that is killed; here its reader does, when all is over."""

    class store(HostStore):
        def __init__(self, spec: CaptureSpec) -> None:
            super().__init__(spec)
            resource_tracker.unregister(self._segment._name, "shared_memory")  # type: ignore[attr-defined]

        def close(self) -> None:
            resource_tracker.register(self._segment._name, "shared_memory")  # type: ignore[attr-defined]
            super().close()

    class reader(HostReader):
        def __init__(self, address: StoreAddress) -> None:
            super().__init__(address)
            atexit.register(self._end)

        def _end(self) -> None:
            resource_tracker.register(self._segment._name, "shared_memory")  # type: ignore[attr-defined]
            _remove(self._segment)


def _mutant(engine: type[Faulty], fault: str, case: str, check: str, slow: bool = False) -> Mutant:
    return Mutant(engine, "capture-replay", fault, killed_by=(case, check), slow=slow)


_STEPS = "each_step_shows_its_own_rows"
_UNWRITTEN = "what_this_step_did_not_capture_is_unreadable"
_LAYERS = "layer_ids_out_of_range_are_refused"
_NARROW = "every_expert_id_survives_storage"
_DENSE = "layers_that_route_nothing_disturb_no_other"
_STRIDES = "ids_are_recorded_whatever_their_strides"
_READER = "another_process_reads_each_tokens_rows"

MUTANTS = (
    _mutant(NegativeLayerWraps, "counts negative layer ids from the end", "capture-layer-minus-one", _LAYERS),
    _mutant(IgnoresLayersPastTheEnd, "ignores a layer id past the end", "capture-layer-one-past", _LAYERS),
    _mutant(NarrowsTo8Bits, "keeps 8 bits of an id whatever E is", "capture-narrow-e257", _NARROW),
    _mutant(NarrowsTo16Bits, "keeps ids in int16 whatever E is", "capture-narrow-e40000", _NARROW),
    _mutant(NarrowsTo9Bits, "keeps 9 bits of an id whatever E is", "capture-narrow-e896-k16", _NARROW),
    _mutant(StoresBfloat16, "keeps ids in bfloat16", "capture-narrow-e896-k22", _NARROW),
    _mutant(
        MinusOneIsAByte,
        "keeps an id of -1 as 255",
        "capture-expert-minus-one-of-256",
        "expert_ids_that_do_not_fit_are_refused",
    ),
    _mutant(CountsTheLayersThatRoute, "numbers layers by the order of captures", "capture-dense-between", _DENSE),
    _mutant(RefusesHalfSteps, "refuses a step in which a layer routed nothing", "capture-draft-layers", _DENSE),
    _mutant(WaitsForLayerZero, "records nothing before layer 0 was captured", "capture-dense-first", _DENSE),
    _mutant(
        NegativeIdsAreExpertZero,
        "records expert 0 for a negative id",
        "capture-expert-minus-one",
        "expert_ids_that_do_not_fit_are_refused",
    ),
    _mutant(
        LayerZeroBeginsTheStep,
        "takes layer 0 for the beginning of every step",
        "capture-unwritten-first-layer-dense-shrinks",
        _UNWRITTEN,
    ),
    _mutant(
        ChecksIdsAfterNarrowing,
        "narrows int64 ids to int32 before it checks their range",
        "capture-expert-two-to-32",
        "expert_ids_that_do_not_fit_are_refused",
    ),
    _mutant(IgnoresShrunkSteps, "keeps a longer step's rows when a shorter comes", "capture-steps-shrink", _STEPS),
    _mutant(ReadsOnce, "gives a read's result again in the next step", "capture-steps-same", _STEPS),
    _mutant(ReadsAnyRow, "gives rows of an earlier, longer step", "capture-unwritten-rows-beyond", _UNWRITTEN),
    _mutant(
        KeepsEarlierLayers,
        "gives an earlier step's ids for a layer not captured",
        "capture-unwritten-layer-of-earlier-step-same-count",
        _UNWRITTEN,
    ),
    _mutant(
        ZeroForUnwrittenLayers,
        "gives expert 0 for a layer never captured",
        "capture-unwritten-layer-never-captured",
        _UNWRITTEN,
    ),
    _mutant(CopiesTooLate, "copies the ids when read, not when captured", "capture-ids-int32-contiguous", _STRIDES),
    _mutant(IgnoresStrides, "reads ids as if they were contiguous", "capture-ids-int64-transposed", _STRIDES),
    _mutant(
        DraftWritesToTheModels,
        "a draft model's rows are written to the model's",
        "capture-two-sessions-draft",
        "sessions_share_no_state",
    ),
    _mutant(
        OneBufferForAll,
        "has one buffer for all sessions",
        "capture-two-sessions",
        "sessions_share_no_state",
    ),
    _mutant(
        NegativeSlotWraps,
        "counts negative slots from the end",
        "store-slot-minus-one",
        "slots_out_of_range_are_refused",
    ),
    _mutant(
        StoresBytes,
        "keeps 8 bits of an id on the host",
        "store-narrow-e257",
        "every_expert_id_survives_the_store",
    ),
    _mutant(
        StoreTakesTheFirstIdBeyond,
        "keeps the first id that no expert has on the host",
        "store-expert-one-past",
        "expert_ids_that_do_not_fit_the_store_are_refused",
    ),
    _mutant(
        NoneIsTheLastOf256,
        "keeps -1 as the last of 256 experts",
        "store-minus-one-e256",
        "no_expert_survives_the_store_beside_every_id",
    ),
    _mutant(
        StoreFilledWithZeros,
        "gives expert 0 for a slot never written",
        "store-unwritten-slots",
        "slots_never_written_are_unreadable",
    ),
    _mutant(
        WritesFromTheFirstSlotOn,
        "writes to consecutive slots",
        "store-slots-of-chunks",
        "slots_belong_to_one_token_at_a_time",
    ),
    _mutant(ReadsInSlotOrder, "reads slots in ascending order", "store-reader-in-another-process", _READER),
    _mutant(
        ReaderTakesMemoryAlong,
        "lets a reading process remove the shared memory when it ends",
        "store-reader-in-another-process",
        _READER,
    ),
    _mutant(
        WritesLayersWithoutLock,
        "writes layer after layer while somebody reads",
        "store-no-torn-rows",
        "a_reader_never_sees_a_torn_row",
    ),
    _mutant(
        KeepsReadersOpen,
        "serves the rows of an owner that is gone",
        "store-owner-closes",
        "a_closed_store_cannot_be_opened",
    ),
    _mutant(OneSegmentForAll, "has one segment for all stores", "store-two-stores", "stores_share_no_memory"),
    _mutant(
        OutlivesItsOwner,
        "leaves a killed owner's memory readable",
        "store-owner-killed",
        "memory_does_not_outlive_a_killed_owner",
        slow=True,
    ),
)
