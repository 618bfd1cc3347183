"""A capturer records the rows of its own tokens, whichever layout arrives, and refuses rows that fit none."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, Rows
from moe_conformance.judging import compare
from moe_conformance.suites.capture_session.cases import (
    CHANGING_COUNTS,
    CHANGING_LAYOUT,
    MARKED_PADDING,
    NAMED_COUNT,
    NO_TOKENS_WRONG_COUNT,
    ONE_EXPERT,
    OWN_ROWS,
    PADDING_ROWS,
    PADDING_UNREADABLE,
    SPELLED_OUT,
    WRONG_COUNT,
    WRONG_VALID_COUNT,
    tp_ranks_judged,
)
from moe_conformance.suites.capture_session.simulated_ranks import LAYERS, TOP_K, SimulatedStep, capture_step
from moe_conformance.suites.capture_session.steps import unreadable


@check(OWN_ROWS + MARKED_PADDING + ONE_EXPERT + PADDING_ROWS)
def test_every_rank_records_its_own_rows(engine: Engine, case: Case) -> None:
    step = _step(case, _counts_padding(engine))
    for dp_rank, count in enumerate(step.counts):
        for tp_rank in tp_ranks_judged(case["kind"], step.told[dp_rank], step.tp):
            with closing(engine.capture_session(step.spec(dp_rank, tp_rank))) as session:
                capture_step(session, step, case["kind"], dp_rank, tp_rank)
                got = session.read(count)
            compare.equal(f"record of rank dp{dp_rank} tp{tp_rank}", got, step.want(dp_rank))


def _counts_padding(engine: Engine) -> bool:
    return "counted_padding" in engine.capabilities()["capture_session"]


def _step(case: Case, counted: bool = False) -> SimulatedStep:
    """counted: padding of a batch counts among its rank's tokens, where engines differ."""
    recipe = case.recipe
    behind = recipe.get("padding_rows", 0), recipe.get("padding_id")
    counted = counted and "padding_rows" in recipe
    return SimulatedStep(case["counts"], case["tp"], recipe.get("padding"), recipe.get("top_k", TOP_K), behind, counted)


@check(PADDING_UNREADABLE)
def test_padding_rows_are_never_readable(engine: Engine, case: Case) -> None:
    """A buffer with room for them has kept none: what lies behind the step's own rows is -1, or raises."""
    step, count, rows = _step(case), case["counts"][0], case["padding_rows"]
    spec = replace(step.spec(0), max_tokens=count + rows)
    with closing(engine.capture_session(spec)) as session:
        capture_step(session, step, case["kind"], 0)
        unreadable("padding rows of this step", lambda: session.read(count + rows), (slice(count, None),))
        compare.equal("record of this step", session.read(count), step.want(0))


@check(SPELLED_OUT)
def test_record_of_a_small_step(engine: Engine, case: Case) -> dict[str, list[list[list[int]]]]:
    step = SimulatedStep(case["counts"], case["tp"], top_k=2)
    facts = {}
    for dp_rank, count in enumerate(step.counts):
        with closing(engine.capture_session(step.spec(dp_rank))) as session:
            capture_step(session, step, case["kind"], dp_rank)
            facts[f"rank {dp_rank}, [token][layer][k]"] = session.read(count).tolist()
    return facts


@check(CHANGING_LAYOUT)
def test_layout_may_change_between_layers(engine: Engine, case: Case) -> None:
    step = SimulatedStep(case["counts"], case["tp"])
    for dp_rank, count in enumerate(step.counts):
        with closing(engine.capture_session(step.spec(dp_rank, tp_rank=1))) as session:
            for layer, kind in enumerate(case["kinds"]):
                session.capture(layer, *step.rows(kind, dp_rank, 1, layer))
            got = session.read(count)
        compare.equal(f"record of rank dp{dp_rank} tp1", got, step.want(dp_rank))


@check(CHANGING_COUNTS)
def test_counts_may_change_between_steps(engine: Engine, case: Case) -> None:
    first, second = (SimulatedStep(counts, case["tp"]) for counts in case["steps"])
    for dp_rank, count in enumerate(second.counts):
        with closing(engine.capture_session(second.spec(dp_rank))) as session:
            capture_step(session, first, case["kind"], dp_rank)
            capture_step(session, second, case["kind"], dp_rank)
            got = session.read(count)
        compare.equal(f"record of rank dp{dp_rank} after the second step", got, second.want(dp_rank))


@check(WRONG_COUNT + NO_TOKENS_WRONG_COUNT + WRONG_VALID_COUNT + NAMED_COUNT)
def test_wrong_row_counts_are_refused_by_number(engine: Engine, case: Case) -> None:
    """wrong: rows that are no padding; behind them may lie padding, as many rows as would make up for any.

    Where padding counts among a rank's tokens, those rows are as many too many, or too few.
    """
    padding = case.recipe.get("padding_rows", 0)
    counted = _counts_padding(engine) and padding > 0
    step = SimulatedStep(case["counts"], case["tp"], behind=(padding if counted else 0, None), counted=counted)
    dp_rank, tp_rank = case["rank"], step.tp - 1
    want = step.want(dp_rank)
    with closing(engine.capture_session(step.spec(dp_rank, tp_rank))) as session:
        capture_step(session, step, case["kind"], dp_rank, tp_rank)
        fits = len(step.rows(case["kind"], dp_rank, tp_rank, 0)[0])
        for valid in case["wrong"]:
            wrong = valid + fits - case["fits"]
            ids = torch.arange((wrong + (0 if counted else padding)) * step.top_k).reshape(-1, step.top_k) % 7
            valid_rows = wrong if padding and not counted else None
            rows = Rows(case["kind"], step.told, lambda ids: torch.cat([ids] * step.tp), valid_rows)
            compare.refused(
                f"{wrong} rows on rank dp{dp_rank} tp{tp_rank}, where {fits} fit",
                partial(session.capture, LAYERS - 1, ids, rows),
                mentions=[str(wrong), str(fits)] if case.clause == "capture.name-counts" else (),
            )
            got = session.read(step.counts[dp_rank])
            compare.equal(f"record after {wrong} rows were refused", got, want)
