"""A token's row of a layer has the same bits whichever tokens are beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging import compare
from moe_conformance.suites.batches import BATCHES
from moe_conformance.suites.layer.cases import INVARIANT_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import answer


@check(INVARIANT_CASES)
@torch.no_grad()
def test_rows_keep_their_bits_in_any_batch(engine: Any, case: Case) -> None:
    """The first token alone, half of the batch, the batch the other way round: bits are those of the whole batch."""
    inputs = inputs_of(case)
    whole = answer(engine, inputs).cpu()
    for name, rows in BATCHES.items():
        index = rows(len(inputs.x))
        part = replace(inputs, x=inputs.x[index], logits=inputs.logits[index])
        compare.equal(f"layer output of {name}, against those rows of the batch", answer(engine, part), whole[index])
