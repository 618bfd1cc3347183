"""What a store keeps is read in every process: each token's own rows, whole, and none once the owner is gone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing

from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import CaptureReader, CaptureSpec, Engine
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.capture_session.steps import (
    ids_at_the_edges,
    record_of,
    refused_or_kept,
    spec_of,
    unreadable,
)
from moe_conformance.suites.capture_store.cases import (
    BOUNDS,
    EXPERT_BOUNDS,
    NARROW,
    NARROW_NONE,
    OWNER_CLOSES,
    OWNER_KILLED,
    READER,
    SLOTS_CHANGE_HANDS,
    TORN,
    TWO,
    UNWRITTEN,
)
from moe_conformance.suites.capture_store.other_process import OtherProcess, own_store, read_slots, rewrite_store

SLOTS = (8, 2, 0, 10, 5)  # of 11, in the order of the tokens


@check(READER)
def test_another_process_reads_each_tokens_rows(engine: Engine, case: Case) -> None:
    want = record_of(0, len(SLOTS))
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(SLOTS, want.int())
        for order in ((0, 1, 2, 3, 4), (4, 1, 1)):  # a second process too: the first must not take the memory along
            slots = [SLOTS[i] for i in order]
            with closing(OtherProcess(read_slots, engine, store.address, slots)) as process:
                compare.equal(f"slots {slots} in another process", process.wait(), want[list(order)])


@check(TORN)
def test_a_reader_never_sees_a_torn_row(engine: Engine, case: Case) -> None:
    # 2^20 ids a write, far more than a model has, so that a writer spends much of its time in one.
    spec = CaptureSpec(max_tokens=4, layers=2048, top_k=128, experts=40000)
    slots, seen = list(range(spec.max_tokens)), set()
    with (
        closing(OtherProcess(rewrite_store, engine, spec, (5000, 10000, 15000), pass_reply=True)) as writer,
        closing(engine.capture_reader(writer.wait())) as reader,
    ):
        for turn in range(40):
            time.sleep(0.003 + 0.0007 * (turn % 7))
            got = read_while_stopped(writer, reader, slots).flatten(1)  # [n, L K]
            torn = (got != got[:, :1]).any(dim=1)
            if torn.any():
                slot, ids = int(torn.int().argmax()), got[torn][0].unique().tolist()
                raise Nonconformance(f"slot {slot} read half-way through a write: got ids {ids}, want one write's")
            seen.add(int(got[0, 0]))
    if len(seen) == 1:
        raise Nonconformance(f"40 reads while somebody wrote: got ids {seen} each time, want those of several writes")


def read_while_stopped(writer: OtherProcess, reader: CaptureReader, slots: list[int]) -> Tensor:
    """Read with the writer halted, or, where the reader waits for it, when the writer was let go on."""
    with ThreadPoolExecutor(1) as threads:
        writer.stop()
        try:
            reading = threads.submit(reader.read, slots)
            wait([reading], timeout=0.1)
        finally:
            writer.go_on()
        return reading.result()


@check(OWNER_KILLED)
def test_memory_does_not_outlive_a_killed_owner(engine: Engine, case: Case) -> None:
    want = record_of(0, len(SLOTS))
    with closing(OtherProcess(own_store, engine, spec_of(11), SLOTS, want.int(), pass_reply=True)) as owner:
        address = owner.wait()
        compare.equal("slots of another process's store", read_slots(engine, address, SLOTS), want)
        owner.kill()
        gone_at = time.monotonic() + 10  # somebody else may have to notice
        while time.monotonic() < gone_at:
            try:
                read_slots(engine, address, SLOTS)
            except Unsupported:
                raise
            except Exception:
                return
            time.sleep(0.05)
    raise Nonconformance("store of a killed owner: got its rows 10 s later, want an error, its memory freed")


@check(OWNER_CLOSES)
def test_a_closed_store_cannot_be_opened(engine: Engine, case: Case) -> None:
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(SLOTS, record_of(0, len(SLOTS)).int())
        compare.equal("slots before", read_slots(engine, store.address, SLOTS), record_of(0, len(SLOTS)))
    compare.refused("reader of a closed store", lambda: read_slots(engine, store.address, SLOTS))


@check(SLOTS_CHANGE_HANDS)
def test_slots_belong_to_one_token_at_a_time(engine: Engine, case: Case) -> None:
    """A prompt in three chunks, another request in between that is preempted and whose slots the prompt takes over."""
    prompt, other = record_of(0, 6), record_of(1, 3)
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write([9, 4], prompt[:2].int())
        store.write([3, 7, 0], other.int())
        store.write([1], prompt[2:3].int())
        store.write([], prompt[:0].int())
        store.write([7, 10, 3], prompt[3:].int())
        with closing(engine.capture_reader(store.address)) as reader:
            read = reader.read([9, 4, 1, 7, 10, 3])
            compare.equal("the prompt's rows", read, prompt)
            compare.equal("the slot that the other request kept", reader.read([0]), other[2:])
            store.write([9, 4, 1], other.int())
            compare.equal("the prompt's rows, read before its slots changed hands", read, prompt)


@check(TWO)
def test_stores_share_no_memory(engine: Engine, case: Case) -> None:
    """Two engines on one host: each reader sees its own store, also when the other one has closed."""
    one, other = record_of(0, len(SLOTS)), record_of(1, len(SLOTS))
    with closing(engine.capture_store(spec_of(11))) as kept:
        with closing(engine.capture_store(spec_of(11))) as closed:
            kept.write(SLOTS, one.int())
            closed.write(SLOTS, other.int())
            compare.equal("slots of the first store", read_slots(engine, kept.address, SLOTS), one)
            compare.equal("slots of the second store", read_slots(engine, closed.address, SLOTS), other)
        compare.equal("slots of the first store, the second closed", read_slots(engine, kept.address, SLOTS), one)


@check(NARROW)
def test_every_expert_id_survives_the_store(engine: Engine, case: Case) -> None:
    want = ids_at_the_edges(case["experts"])
    slots = list(range(len(want)))
    with closing(engine.capture_store(spec_of(len(want), case["experts"]))) as store:
        store.write(slots, want.int())
        compare.equal(f"ids of {case['experts']} experts", read_slots(engine, store.address, slots), want)


@check(NARROW_NONE)
def test_no_expert_survives_the_store_beside_every_id(engine: Engine, case: Case) -> None:
    """A layer that a token was not captured in is written as -1, and read as that, unless the store refuses it."""
    want = ids_at_the_edges(case["experts"])
    want[:, 1] = -1
    slots = list(range(len(want)))
    with closing(engine.capture_store(spec_of(len(want), case["experts"]))) as store:
        try:
            store.write(slots, want.int())
        except Unsupported:
            raise
        except Exception:
            return  # refused, in whatever words
        got = read_slots(engine, store.address, slots)
        unreadable("the layer written as -1", lambda: got, (slice(None), 1), case["experts"])
        for layer in (0, 2):
            compare.equal(f"ids of {case['experts']} experts, layer {layer}", got[:, layer], want[:, layer])


@check(UNWRITTEN)
def test_slots_never_written_are_unreadable(engine: Engine, case: Case) -> None:
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(SLOTS, record_of(0, len(SLOTS)).int())
        for slot in sorted(set(range(11)) - set(SLOTS)):
            unreadable(f"slot {slot}", lambda slot=slot: read_slots(engine, store.address, [slot]), (slice(None),))

        # A slot's next owner did not capture layer 1; that of the owner before must not show through.
        rows = record_of(1, len(SLOTS)).int()
        rows[:, 1] = -1

        def write_and_read() -> Tensor:
            store.write(SLOTS, rows)
            return read_slots(engine, store.address, SLOTS)

        unreadable("layer 1 written as -1", write_and_read, (slice(None), 1))


@check(BOUNDS)
def test_slots_out_of_range_are_refused(engine: Engine, case: Case) -> None:
    everything, want = list(range(11)), record_of(0, 11)
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(everything, want.int())
        compare.refused(f"writing slots 2 and {case['slot']}", lambda: store.write([2, case["slot"]], want[:2].int()))
        compare.refused(f"reading slot {case['slot']}", lambda: read_slots(engine, store.address, [case["slot"]]))
        compare.equal("slots after the refusal", read_slots(engine, store.address, everything), want)


@check(EXPERT_BOUNDS)
def test_expert_ids_that_do_not_fit_the_store_are_refused(engine: Engine, case: Case) -> None:
    """Nothing of the write is kept then."""
    want, rows = record_of(0, len(SLOTS)), record_of(1, len(SLOTS))
    rows[3, 1, 2] = case["expert_id"]
    with closing(engine.capture_store(spec_of(11, case["experts"]))) as store:
        store.write(SLOTS, want.int())

        def write_and_read() -> Tensor:
            try:
                store.write(SLOTS, rows)
            except Exception:
                compare.equal("slots after the refusal", read_slots(engine, store.address, SLOTS), want)
                raise
            return read_slots(engine, store.address, SLOTS)

        refused_or_kept(engine, "capture_store", f"expert id {case['expert_id']}", write_and_read, rows)
