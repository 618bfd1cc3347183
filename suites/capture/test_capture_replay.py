"""What was captured is read back: each token's own rows, every id, nothing of before, in every process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import CaptureReader, CaptureSession, CaptureSpec, Engine, Rows
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poison_
from moe_conformance.suites.capture.cases import (
    EXPERT_BOUNDS,
    IDS_AS_THEY_COME,
    LAYER_BOUNDS,
    NARROW,
    SMALLER_STEP,
    STORE_BOUNDS,
    STORE_NARROW,
    STORE_OWNER_CLOSES,
    STORE_OWNER_KILLED,
    STORE_READER,
    STORE_SLOTS,
    STORE_TORN,
    STORE_TWO,
    STORE_UNWRITTEN,
    TWO_SESSIONS,
    UNWRITTEN,
)
from moe_conformance.suites.capture.other_process import OtherProcess, own_store, read_slots, rewrite_store

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


@check(SMALLER_STEP)
def test_each_step_shows_its_own_rows(engine: Engine, case: Case) -> None:
    """And what was read of the step before stays as it was read."""
    before, read = 0, torch.zeros(0, LAYERS, TOP_K)
    with closing(engine.capture_session(spec_of(9))) as session:
        for step, tokens in enumerate(case["steps"]):
            capture_step(session, step, tokens)
            compare.equal(f"earlier read of step {step - 1}", read, record_of(step - 1, before))
            for asked in range(tokens, -1, -1):
                compare.equal(f"{asked} rows of step {step}", session.read(asked), record_of(step, tokens)[:asked])
            before, read = tokens, session.read(tokens)


@check(UNWRITTEN)
def test_what_this_step_did_not_capture_is_unreadable(engine: Engine, case: Case) -> None:
    last, layers = 0, ()
    with closing(engine.capture_session(spec_of(9))) as session:
        for step, (tokens, layers) in enumerate(case["steps"]):
            capture_step(session, step, tokens, layers)
            last = tokens
        unreadable("rows beyond this step", lambda: session.read(case["read"]), (slice(last, None),))
        for layer in set(range(LAYERS)) - set(layers):
            unreadable(f"layer {layer} of this step", lambda: session.read(case["read"]), (slice(None), layer))
        if last:
            own = session.read(last)
            for layer in layers:
                want = ids_of(len(case["steps"]) - 1, last, layer)
                compare.equal(f"layer {layer} of this step", own[:, layer], want)


@check(LAYER_BOUNDS)
def test_layer_ids_out_of_range_are_refused(engine: Engine, case: Case) -> None:
    with closing(engine.capture_session(spec_of(5, layers=case["layers"]))) as session:
        capture_step(session, 0, 5)
        compare.refused(
            f"layer {case['layer_id']} of {case['layers']}", lambda: capture(session, case["layer_id"], ids_of(1, 5, 0))
        )
        compare.equal("record after the refusal", session.read(5), record_of(0, 5))


@check(EXPERT_BOUNDS)
def test_expert_ids_that_do_not_fit_are_refused(engine: Engine, case: Case) -> None:
    ids = ids_of(1, 5, 1)
    ids[3, 1] = case["expert_id"]

    def capture_and_read() -> Tensor:
        for layer in range(LAYERS):
            capture(session, layer, ids if layer == 1 else ids_of(1, 5, layer))
        return session.read(5)[3, 1]

    with closing(engine.capture_session(spec_of(5, case["experts"]))) as session:
        capture_step(session, 0, 5)
        # Capturing must not wait for a device, so an engine may notice as late as it is asked for the record.
        refused_or_kept(engine, f"expert id {case['expert_id']} of {case['experts']}", capture_and_read, ids[3])
        capture_step(session, 2, 5)
        compare.equal("record of the step after the refusal", session.read(5), record_of(2, 5))


def refused_or_kept(engine: Engine, what: str, capture_and_read: Callable[[], Tensor], given: Tensor) -> None:
    """An engine that declares no bounds may also give the ids back as they came."""
    if "expert_bounds" in engine.capabilities()["capture_session"]:
        compare.refused(what, capture_and_read)
        return
    try:
        got = capture_and_read()
    except Unsupported:
        raise
    except Exception:
        return
    compare.equal(f"{what}, which was neither refused nor kept", got, given)


@check(NARROW)
def test_every_expert_id_survives_storage(engine: Engine, case: Case) -> None:
    want = ids_at_the_edges(case["experts"])
    for dtype in (torch.int32, torch.int64):
        with closing(engine.capture_session(spec_of(len(want), case["experts"]))) as session:
            for layer in range(LAYERS):
                capture(session, layer, want[:, layer].to(dtype))
            compare.equal(f"record of {dtype} ids of {case['experts']} experts", session.read(len(want)), want)


def ids_at_the_edges(experts: int) -> Tensor:
    """[n, L, K]: the lowest and highest ids, and those on both sides of 2^7, 2^8, 2^15 and 2^16."""
    edges = {0, 1, experts - 2, experts - 1, *(2**bits - side for bits in (7, 8, 15, 16) for side in (0, 1))}
    legal = torch.tensor(sorted(edge for edge in edges if edge < experts))
    places = torch.arange(len(legal))[:, None, None] + torch.arange(LAYERS)[:, None] + torch.arange(TOP_K)
    return legal[places % len(legal)]


@check(IDS_AS_THEY_COME)
def test_ids_are_recorded_whatever_their_strides(engine: Engine, case: Case) -> None:
    with closing(engine.capture_session(spec_of(7))) as session:
        for layer in range(LAYERS):
            ids = laid_out(ids_of(0, 7, layer).to(getattr(torch, case["dtype"])), case["layout"])
            before = ids.clone()
            capture(session, layer, ids)
            compare.equal(f"ids of layer {layer} after capture", ids, before)
            poison_(ids)  # a router uses its output buffer again
        compare.equal("record", session.read(7), record_of(0, 7))


def laid_out(ids: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them is poison."""
    tokens, top_k = ids.shape
    if layout == "contiguous":
        return ids.clone()
    if layout == "transposed":
        return ids.T.contiguous().T
    rows, columns = (2, 1) if layout == "every-second-row" else (1, 2)
    view = poison_(ids.new_empty(rows * tokens, columns * top_k))[::rows, ::columns]
    return view.copy_(ids)


@check(TWO_SESSIONS)
def test_sessions_share_no_state(engine: Engine, case: Case) -> None:
    with closing(engine.capture_session(spec_of(9))) as one, closing(engine.capture_session(spec_of(5))) as other:
        for layer in range(LAYERS):
            capture(one, layer, ids_of(0, 9, layer))
            capture(other, layer, ids_of(1, 4, layer))
        compare.equal("record of the first session", one.read(9), record_of(0, 9))
        compare.equal("record of the second session", other.read(4), record_of(1, 4))


# Host store -------------------------------------------------------------------------------------------------------

SLOTS = (8, 2, 0, 10, 5)  # of 11, in the order of the tokens


@check(STORE_READER)
def test_another_process_reads_each_tokens_rows(engine: Engine, case: Case) -> None:
    want = record_of(0, len(SLOTS))
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(SLOTS, want.int())
        for order in ((0, 1, 2, 3, 4), (4, 1, 1)):  # a second process too: the first must not take the memory along
            slots = [SLOTS[i] for i in order]
            with closing(OtherProcess(read_slots, engine, store.address, slots)) as process:
                compare.equal(f"slots {slots} in another process", process.wait(), want[list(order)])


@check(STORE_TORN)
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


@check(STORE_OWNER_KILLED)
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


@check(STORE_OWNER_CLOSES)
def test_a_closed_store_cannot_be_opened(engine: Engine, case: Case) -> None:
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(SLOTS, record_of(0, len(SLOTS)).int())
        compare.equal("slots before", read_slots(engine, store.address, SLOTS), record_of(0, len(SLOTS)))
    compare.refused("reader of a closed store", lambda: read_slots(engine, store.address, SLOTS))


@check(STORE_SLOTS)
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


@check(STORE_TWO)
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


@check(STORE_NARROW)
def test_every_expert_id_survives_the_store(engine: Engine, case: Case) -> None:
    want = ids_at_the_edges(case["experts"])
    slots = list(range(len(want)))
    with closing(engine.capture_store(spec_of(len(want), case["experts"]))) as store:
        store.write(slots, want.int())
        compare.equal(f"ids of {case['experts']} experts", read_slots(engine, store.address, slots), want)


@check(STORE_UNWRITTEN)
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


@check(STORE_BOUNDS)
def test_slots_out_of_range_are_refused(engine: Engine, case: Case) -> None:
    everything, want = list(range(11)), record_of(0, 11)
    with closing(engine.capture_store(spec_of(11))) as store:
        store.write(everything, want.int())
        compare.refused(f"writing slots 2 and {case['slot']}", lambda: store.write([2, case["slot"]], want[:2].int()))
        compare.refused(f"reading slot {case['slot']}", lambda: read_slots(engine, store.address, [case["slot"]]))
        compare.equal("slots after the refusal", read_slots(engine, store.address, everything), want)
