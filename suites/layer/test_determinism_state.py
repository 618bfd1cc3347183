"""A layer's output is of its arguments alone, not of what was called before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import LayerInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import twice
from moe_conformance.oracle.layer import expected_layer
from moe_conformance.suites.layer.cases import STATE_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import answer, assert_output


def another(inputs: LayerInputs) -> LayerInputs:
    """A layer of the same shape and of other values."""
    experts = {name: tensor.flip(0) for name, tensor in inputs.tensors.items() if tensor.ndim > 1}
    return replace(inputs, x=inputs.x.flip(0) * 3, logits=inputs.logits.flip(0), tensors={**inputs.tensors, **experts})


@check(STATE_CASES)
@torch.no_grad()
def test_a_second_run_gives_the_same_bits(engine: Any, case: Case) -> None:
    """A layer, another of the same shape, more tokens, the first again: bits, or the same within rounding."""
    inputs = inputs_of(case)
    first = answer(engine, inputs).clone()
    want, bound = expected_layer(inputs)
    other = another(inputs)
    if compare.is_close(first, want, bound):
        try:
            assert_output(engine, other)
        except Nonconformance as error:
            raise Nonconformance(f"after another layer of the same shape: {error}") from error
    more = replace(other, x=other.x.repeat(5, 1), logits=other.logits.repeat(5, 1))
    answer(engine, more, "layer output of more tokens")
    again, what = answer(engine, inputs), "layer output of the same call again, against the first"
    if case.level == "SHOULD":
        compare.equal(what, again, first)
    else:
        compare.close(what, again, first, twice(bound))
