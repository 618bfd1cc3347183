"""A token's row has the same bits whichever tokens are beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.suites.batches import BATCHES
from moe_conformance.suites.experts.cases import INVARIANT_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import answer


@check(INVARIANT_CASES)
@torch.no_grad()
def test_rows_keep_their_bits_in_any_batch(engine: Any, case: Case) -> None:
    """The first token alone, half of the batch, the batch the other way round: bits are those of the whole batch."""
    inputs = inputs_of(case)
    whole = answer(engine, inputs).cpu()
    for name, rows in BATCHES.items():
        index = rows(case["T"])
        part = replace(inputs, x=inputs.x[index], ids=inputs.ids[index], weights=inputs.weights[index])
        compare.equal(f"routed sum of {name}, against those rows of the batch", answer(engine, part), whole[index])
