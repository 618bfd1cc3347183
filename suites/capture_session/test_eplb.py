"""What is recorded are experts, whichever of their copies was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, RowKind, Rows
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.capture_session.cases import LOGICAL
from moe_conformance.suites.capture_session.steps import KINDS, TOP_K, spec_of


@check(LOGICAL)
def test_copies_are_recorded_as_their_experts(engine: Engine, case: Case) -> None:
    """On the last of the ranks. All copies are chosen in turn; a row names no expert twice."""
    counts, experts = case["counts"], case["experts"]
    rank = len(counts) - 1
    kinds: Sequence[RowKind] = ("concatenated", "local") if rank else KINDS
    offered = engine.capabilities()["capture_session"]
    kind = next((kind for kind in kinds if kind in offered), None)
    if kind is None:
        raise Unsupported(f"capture_session: got no layout, want one of {', '.join(kinds)}")
    start, own = (sum(counts[:rank]) if kind == "concatenated" else 0), counts[rank]
    spec = replace(spec_of(max(counts), experts), dp_rank=rank, dp_size=len(counts))

    def judge(copied: bool) -> None:
        with closing(engine.capture_session(spec)) as session:
            for step, tables in enumerate(case["tables"]):
                want = []
                for layer, copies in enumerate(tables):
                    table = torch.tensor(copies)
                    physical = chosen(table, start + own, step + layer)
                    want.append(table[physical[start:]])
                    rows = Rows(kind, counts, gather=lambda ids: ids, physical_to_logical=table if copied else None)
                    session.capture(layer, physical if copied else table[physical], rows)
                compare.equal(f"experts recorded in step {step}", session.read(own), torch.stack(want, dim=1))

    assert_holds("capture_session", "ids of copies", judge)


def chosen(table: Tensor, tokens: int, turn: int) -> Tensor:
    """Physical ids [tokens, K] from all over the table, and of each row's experts one copy."""
    rows, place = [], turn
    for _ in range(tokens):
        row: list[int] = []
        while len(row) < TOP_K:
            place = (place + 101) % len(table)  # prime to every length
            if table[place] not in table[row]:
                row.append(place)
        rows.append(row)
    return torch.tensor(rows)
