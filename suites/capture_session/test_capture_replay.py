"""What was captured is read back: each token's own rows, every id, nothing of before."""

from __future__ import annotations

import contextlib
from contextlib import closing

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import poison_
from moe_conformance.suites.capture_session.cases import (
    DENSE_BETWEEN,
    DRAFT,
    EXPERT_BOUNDS,
    IDS_AS_THEY_COME,
    LAYER_BOUNDS,
    MANY_EXPERTS,
    NARROW,
    SMALLER_STEP,
    TWO_SESSIONS,
    UNWRITTEN,
)
from moe_conformance.suites.capture_session.steps import (
    LAYERS,
    TOP_K,
    OnlyRank,
    every_id,
    ids_at_the_edges,
    ids_of,
    record_of,
    refused_or_kept,
    spec_of,
    unreadable,
)


@check(SMALLER_STEP)
def test_each_step_shows_its_own_rows(engine: Engine, case: Case) -> None:
    """And what was read of the step before stays as it was read."""
    before, read = 0, record_of(0, 0)
    with closing(OnlyRank(engine, spec_of(9))) as session:
        for step, tokens in enumerate(case["steps"]):
            session.capture_step(step, tokens)
            compare.equal(f"earlier read of step {step - 1}", read, record_of(step - 1, before))
            for asked in range(tokens, -1, -1):
                compare.equal(f"{asked} rows of step {step}", session.read(asked), record_of(step, tokens)[:asked])
            before, read = tokens, session.read(tokens)


@check(UNWRITTEN)
def test_what_this_step_did_not_capture_is_unreadable(engine: Engine, case: Case) -> None:
    """Rows beyond the step read as -1 or raise. A layer reads as -1: others of the same rows must be readable."""
    last, layers = 0, ()
    with closing(OnlyRank(engine, spec_of(9))) as session:
        for step, (tokens, layers) in enumerate(case["steps"]):
            session.capture_step(step, tokens, layers)
            last = tokens
        unreadable("rows beyond this step", lambda: session.read(case["read"]), (slice(last, None),))
        if last:
            own = session.read(last)
            for layer in range(LAYERS):
                want = ids_of(len(case["steps"]) - 1, last, layer)
                want = want if layer in layers else torch.full_like(want, -1)
                compare.equal(f"layer {layer} of this step", own[:, layer], want)


@check(DENSE_BETWEEN)
def test_layers_that_route_nothing_disturb_no_other(engine: Engine, case: Case) -> None:
    """Each layer that was captured reads as what was captured, whatever the others read as."""
    with closing(OnlyRank(engine, spec_of(9, layers=case["layers"]))) as session:
        for step, (tokens, layers) in enumerate(case["steps"]):
            session.capture_step(step, tokens, layers)
            got = session.read(tokens)
            compare.shape_and_type(f"record of step {step}", got, (tokens, case["layers"], TOP_K), integer=True)
            for layer in layers:
                compare.equal(f"layer {layer} of step {step}", got[:, layer], ids_of(step, tokens, layer))


@check(LAYER_BOUNDS)
def test_layer_ids_out_of_range_are_refused(engine: Engine, case: Case) -> None:
    with closing(OnlyRank(engine, spec_of(5, layers=case["layers"]))) as session:
        session.capture_step(0, 5)
        compare.refused(
            f"layer {case['layer_id']} of {case['layers']}", lambda: session.capture(case["layer_id"], ids_of(1, 5, 0))
        )
        compare.equal("record after the refusal", session.read(5), record_of(0, 5))


@check(EXPERT_BOUNDS)
def test_expert_ids_that_do_not_fit_are_refused(engine: Engine, case: Case) -> None:
    ids = ids_of(1, 5, 1)
    ids[3, 1] = case["expert_id"]

    def capture_and_read() -> Tensor:
        for layer in range(LAYERS):
            session.capture(layer, ids if layer == 1 else ids_of(1, 5, layer))
        return session.read(5)[3, 1]

    with closing(OnlyRank(engine, spec_of(5, case["experts"]))) as session:
        session.capture_step(0, 5)
        # Capturing must not wait for a device, so an engine may notice as late as it is asked for the record.
        refused_or_kept(
            engine, "capture_session", f"expert id {case['expert_id']} of {case['experts']}", capture_and_read, ids[3]
        )
        session.capture_step(2, 5)
        compare.equal("record of the step after the refusal", session.read(5), record_of(2, 5))


@check(NARROW + MANY_EXPERTS)
def test_every_expert_id_survives_storage(engine: Engine, case: Case) -> None:
    experts, top_k = case["experts"], case.recipe.get("top_k")
    want = every_id(experts, top_k) if top_k else ids_at_the_edges(experts)
    for dtype in (torch.int32, torch.int64):
        with closing(OnlyRank(engine, spec_of(len(want), experts, top_k=top_k or TOP_K))) as session:
            for layer in range(LAYERS):
                session.capture(layer, want[:, layer].to(dtype))
            compare.equal(f"record of {dtype} ids of {experts} experts", session.read(len(want)), want)


@check(IDS_AS_THEY_COME)
def test_ids_are_recorded_whatever_their_strides(engine: Engine, case: Case) -> None:
    with closing(OnlyRank(engine, spec_of(7))) as session:
        for layer in range(LAYERS):
            ids = laid_out(ids_of(0, 7, layer).to(getattr(torch, case["dtype"])), case["layout"])
            before = ids.clone()
            session.capture(layer, ids)
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
    """Of a model, and of one of so many layers beside it, layer by layer in turn."""
    layers = case["layers"]
    with closing(OnlyRank(engine, spec_of(9))) as one, closing(OnlyRank(engine, spec_of(5, layers=layers))) as other:
        for layer in range(LAYERS):
            one.capture(layer, ids_of(0, 9, layer))
            if layer < layers:
                other.capture(layer, ids_of(1, 4, layer))
        compare.equal("record of the first session", one.read(9), record_of(0, 9))
        compare.equal("record of the second session", other.read(4), record_of(1, 4, layers))


@check(DRAFT)
def test_a_draft_model_leaves_the_target_alone(engine: Engine, case: Case) -> None:
    """Both number their layers from 0. The draft's ids are other ones than the target's, and it has two a row."""
    where = case["draft"]
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(closing(OnlyRank(engine, spec_of(9))))
        draft = None if where == "made-later" else OnlyRank(engine, spec_of(9, layers=1, top_k=2))

        def drafted(step: int, tokens: int) -> None:
            assert draft is not None
            draft.capture(0, ids_of(step + 2, tokens, 1)[:, :2].contiguous())

        for step, tokens in enumerate(case["steps"]):
            for layer in range(LAYERS):
                target.capture(layer, ids_of(step, tokens, layer))
                if draft is None:
                    draft = OnlyRank(engine, spec_of(9, layers=1, top_k=2))
            assert draft is not None
            drafted(step, tokens)
            for rows in (2, 1, 2) if where == "several-passes" else ():
                drafted(step, rows)
            if where == "closed-first" and step == len(case["steps"]) - 1:
                draft.close()
            compare.equal(f"the target's record of step {step}", target.read(tokens), record_of(step, tokens))
        if draft is not None and where != "closed-first":
            draft.close()
