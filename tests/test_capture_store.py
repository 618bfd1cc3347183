"""What the reference capturer and store promise beyond the protocol."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_conformance.engine import CaptureSpec, RowKind, Rows
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.capture import Capturer, local_rows, row_counts, storage_dtype
from moe_conformance.reference_impl.store import HostReader, HostStore
from moe_conformance.suites.capture_session.cases import tp_ranks_judged
from moe_conformance.suites.capture_session.simulated_ranks import SimulatedStep, capture_step
from moe_conformance.suites.capture_store.other_process import read_slots

SPEC = CaptureSpec(max_tokens=6, layers=2, top_k=2, experts=250)
IDS = torch.tensor([[3, 249], [0, 7], [12, 1]])


def local(ids: torch.Tensor) -> Rows:
    return Rows("local", (len(ids),))


class _NoticesWaits(TorchDispatchMode):
    """Raises where an operation would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["concatenated", "local", "sequence_shard", "sequence_gathered"])
def test_capture_never_waits_for_the_device(kind: RowKind) -> None:
    step = SimulatedStep((3, 5), tp=2)
    session = Capturer(step.spec(1))
    arriving = [step.rows(kind, 1, 0, layer) for layer in range(3)]
    with _NoticesWaits():
        for layer, (ids, rows) in enumerate(arriving):
            session.capture(layer, ids, rows)
        with pytest.raises(AssertionError, match="waits for the device"):
            session.read(5)


def _arrivals() -> Iterator[tuple[SimulatedStep, RowKind, int, int]]:
    for counts in itertools.product(range(5), repeat=2):
        for tp, kind, dp_rank in itertools.product((1, 2, 3), row_counts(counts, 0, 1), (0, 1)):
            for tp_rank in range(tp):
                yield SimulatedStep(counts, tp), kind, dp_rank, tp_rank


def test_rows_are_judged_exactly_where_their_number_tells_the_layout() -> None:
    for step, kind, dp_rank, tp_rank in _arrivals():
        ids, rows = step.rows(kind, dp_rank, tp_rank, layer=0)
        spec = step.spec(dp_rank, tp_rank)
        sizes = row_counts(step.counts, dp_rank, step.tp)
        readings = [local_rows(ids, replace(rows, kind=other), spec) for other in sizes if sizes[other] == len(ids)]
        agree = all(torch.equal(reading, step.own(dp_rank, 0)) for reading in readings)
        judged = tp_rank in tp_ranks_judged(kind, step.counts[dp_rank], step.tp)
        assert agree == judged, (step.counts, step.tp, kind, dp_rank, tp_rank)


def test_refusal_names_what_came_and_the_count_of_every_layout() -> None:
    step = SimulatedStep((171, 233), tp=2)
    with pytest.raises(InputError) as refused:
        Capturer(step.spec(1)).capture(0, torch.zeros(57, 3, dtype=torch.int64), Rows("local", step.counts))
    assert all(str(count) in str(refused.value) for count in (57, 404, 233, 117, 406))


@pytest.mark.parametrize("kind", ["concatenated", "local", "sequence_shard", "sequence_gathered"])
def test_padding_rows_are_cut_before_the_layout_is_read(kind: RowKind) -> None:
    """Whatever they hold, also no expert: the step is recorded as if they were not there."""
    step = SimulatedStep((3, 5), tp=2)
    session, padding = Capturer(step.spec(1)), torch.full((4, 3), -7)
    for layer in range(step.spec(1).layers):
        ids, rows = step.rows(kind, 1, 0, layer)
        padded = torch.cat([ids, padding.to(ids.dtype)[:, : ids.shape[1]]])
        session.capture(layer, padded, replace(rows, valid_rows=len(ids)))
    assert all(torch.equal(session.read(5)[:, layer].long(), step.own(1, layer).long()) for layer in range(3))


@pytest.mark.parametrize(("valid", "message"), [(-1, "got -1, want 0 to 3"), (4, "got 4, want 0 to 3"), (2, "2 rows")])
def test_valid_rows_that_do_not_fit_are_refused(valid: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Capturer(SPEC).capture(0, IDS, replace(local(IDS), valid_rows=valid))


@pytest.mark.parametrize("wrong", [Rows("local", (3, 3)), Rows("local", (-3,)), Rows("sequence_shard", (3,))])
def test_rows_that_contradict_the_spec_are_refused(wrong: Rows) -> None:
    with pytest.raises(InputError, match="rows"):
        Capturer(SPEC).capture(0, IDS, wrong)


@pytest.mark.parametrize("ids", [IDS.float(), IDS[:, :1], IDS.repeat(3, 1)])
def test_ids_that_do_not_fit_the_buffer_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"ids|rows"):
        Capturer(SPEC).capture(0, ids, local(ids))


@pytest.mark.parametrize("bad", [-1, -256, 250])
def test_bad_ids_are_reported_once_and_then_unwritten(bad: int) -> None:
    session = Capturer(SPEC)
    session.capture(0, IDS, local(IDS))
    ids = IDS.clone()
    ids[1, 0] = bad
    session.capture(1, ids, local(ids))
    with pytest.raises(InputError, match="layer 1 row 1"):
        session.read(3)
    assert session.read(3)[:, 1].unique().tolist() == [-1]
    assert torch.equal(session.read(3)[:, 0], IDS.int())


@pytest.mark.parametrize(("experts", "bytes_an_id"), [(255, 1), (256, 2), (32768, 2), (32769, 4)])
def test_storage_is_as_narrow_as_ids_and_a_sentinel_allow(experts: int, bytes_an_id: int) -> None:
    assert storage_dtype(experts).itemsize == bytes_an_id


def test_a_read_is_not_changed_by_the_next_step() -> None:
    step = SimulatedStep((4,), tp=1)
    session = Capturer(step.spec(0))
    capture_step(session, step, "local", 0)
    first = session.read(4)
    session.capture(0, torch.zeros(4, 3, dtype=torch.int64), Rows("local", (4,)))
    assert torch.equal(first, step.want(0).int())


def test_a_closed_session_takes_and_gives_nothing() -> None:
    session = Capturer(SPEC)
    session.close()
    with pytest.raises(InputError):
        session.capture(0, IDS, local(IDS))
    with pytest.raises(InputError):
        session.read(0)


# Store ------------------------------------------------------------------------------------------------------------

ROWS = torch.stack([IDS, torch.full_like(IDS, -1)], dim=1)  # the second layer has no experts


def test_layers_without_experts_stay_unwritten_in_the_store() -> None:
    with closing(HostStore(SPEC)) as store, closing(HostReader(store.address)) as reader:
        store.write([5, 0, 2], ROWS)
        assert torch.equal(reader.read([0, 5, 2, 1]), torch.cat([ROWS[[1, 0, 2]], torch.full((1, 2, 2), -1)]).int())


@pytest.mark.parametrize(
    ("slots", "rows"),
    [
        ([1, 1, 2], ROWS),
        ([0, 1], ROWS),
        ([0, 1, 2], ROWS[:, :1]),
        ([0, 1, 2], ROWS.float()),
        ([0, 1, 2], torch.full_like(ROWS, 250)),
        ([0, 1, 2], torch.full_like(ROWS, -2)),
    ],
)
def test_writes_that_do_not_fit_change_nothing(slots: list[int], rows: torch.Tensor) -> None:
    with closing(HostStore(SPEC)) as store, closing(HostReader(store.address)) as reader:
        with pytest.raises(InputError):
            store.write(slots, rows)
        assert reader.read(range(6)).unique().tolist() == [-1]


def test_a_spawned_child_reads_and_leaves_the_memory() -> None:
    """A child of the owner has the same resource tracker, which must not be told that the segment is gone."""
    with closing(HostStore(SPEC)) as store:
        store.write([4], ROWS[:1])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert torch.equal(pool.apply(read_slots, (Reference(), store.address, [4])), ROWS[:1].int())
        with closing(HostReader(pickle.loads(pickle.dumps(store.address)))) as reader:
            assert torch.equal(reader.read([4]), ROWS[:1].int())


def test_an_owner_that_forgets_to_close_leaves_nothing_behind() -> None:
    forgets = "\n".join(
        [
            "from moe_conformance.engine import CaptureSpec",
            "from moe_conformance.reference_impl.store import HostReader, HostStore",
            "store = HostStore(CaptureSpec(max_tokens=2, layers=1, top_k=1, experts=4))",
            "reader = HostReader(store.address)",
            "print(reader.read([1]).tolist(), store.address.segment)",
        ]
    )
    ended = subprocess.run([sys.executable, "-c", forgets], capture_output=True, text=True, check=True)
    rows, segment = ended.stdout.rsplit(maxsplit=1)
    assert (rows, ended.stderr) == ("[[[-1]]]", "")
    with closing(HostStore(SPEC)) as store, pytest.raises(InputError, match="gone"):
        HostReader(replace(store.address, segment=segment))
