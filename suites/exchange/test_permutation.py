"""What travels: the rows that a rank's experts are given."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Exchanged
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.exchange.cases import ARRIVALS
from moe_conformance.suites.exchange.ranks import Layer, exchanged


def rows_by_expert(rows: Tensor, ids: Tensor) -> dict[int, Counter[bytes]]:
    """Local expert -> how often each row, by its bytes, came for it."""
    found: dict[int, Counter[bytes]] = {}
    as_bytes = [bytes(row.tolist()) for row in rows.contiguous().view(torch.uint8)]
    for row, experts in zip(as_bytes, ids.tolist(), strict=True):
        for expert in experts:
            if expert >= 0:
                found.setdefault(expert, Counter())[row] += 1
    return found


def arrived(what: str, got: Exchanged, x: Tensor) -> dict[int, Counter[bytes]]:
    if got.arrived is None:
        raise Nonconformance(f"{what}: got None, want them, as the feature arrivals says")
    rows, ids = got.arrived
    compare.shape_and_type(f"{what}, rows", rows, (len(rows), x.shape[1]), integer=False)
    compare.shape_and_type(f"{what}, ids", ids, (len(rows), *ids.shape[1:2]), integer=True)
    compare.same(f"{what}, dtype", str(rows.dtype), str(x.dtype))
    return rows_by_expert(rows.cpu(), ids.cpu())


@check(ARRIVALS)
@torch.no_grad()
def test_experts_are_given_the_rows_that_chose_them(engine: Any, case: Case) -> dict[str, list[int]]:
    """Of all ranks, each once for an expert, with all its bits. The facts are each rank's rows by local expert."""
    layer = Layer(case)
    everybody = layer.steps[-1]
    x, ids = (torch.cat([getattr(inputs, name) for inputs in everybody]) for name in ("x", "ids"))
    facts = {}
    for inputs, got in zip(everybody, exchanged(engine, case, layer)[-1], strict=True):
        local = layer.maps[inputs.rank][ids.clamp(min=0)].masked_fill(ids < 0, -1)
        what = f"rows that arrived on rank {inputs.rank} of {inputs.ranks}"
        wanted, found = rows_by_expert(x, local), arrived(what, got, x)
        held = range(len(layer.held(inputs.rank)))
        compare.same(f"{what}, local ids beyond its experts", sorted(found.keys() - set(held)), [])
        for expert in held:
            rows, want = found.get(expert, Counter()), wanted.get(expert, Counter())
            which = f"{what} for its local expert {expert}"
            compare.same(f"{which}, their number", rows.total(), want.total())
            compare.same(f"{which}, those of tokens that did not choose it", (rows - want).total(), 0)
        facts[f"rank {inputs.rank}"] = [wanted.get(expert, Counter()).total() for expert in held]
    return facts
