"""What rows of padding hold never reaches the row of a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import padding_rows
from moe_conformance.judging.repeats import assert_repeats
from moe_conformance.oracle.bounds import twice
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.suites.experts.cases import PADDING_CASES
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import answer


@check(PADDING_CASES)
@torch.no_grad()
def test_padding_rows_change_no_token(engine: Any, case: Case) -> None:
    """Padding of NaN, infinities and huge numbers changes no bit of a token; padding of other experts no value.

    Bits are asked for only between batches in which every expert has as many rows: an engine may choose its kernel by
    their number.
    """
    inputs, tokens = inputs_of(case), case["T"] - case["padding"]
    first = answer(engine, inputs).cpu()[:tokens].clone()
    alone = replace(inputs, x=inputs.x[:tokens], ids=inputs.ids[:tokens], weights=inputs.weights[:tokens])
    (want, bound), what = expected_experts(alone), "routed sum of the tokens"
    if not compare.is_close(first, want, bound):
        raise Unsupported("experts: not judged with padding, for it is wrong with rows like any other, too")
    filled = replace(inputs, x=padding_rows(inputs.x, tokens), weights=padding_rows(inputs.weights, tokens))
    got = answer(engine, filled).cpu()[:tokens]
    assert_repeats(f"{what}, with NaN in the padding", engine, "experts", got, first, bound)
    filled = replace(filled, ids=torch.cat([inputs.ids[:tokens], inputs.ids[:1].expand(case["padding"], -1)]))
    got = answer(engine, filled).cpu()[:tokens]
    compare.close(f"{what}, with other experts in the padding", got, first, twice(bound))
    compare.close(f"{what}, against the tokens alone", first, answer(engine, alone).cpu(), twice(bound))
