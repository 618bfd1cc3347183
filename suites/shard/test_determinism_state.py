"""A rank's part is of its arguments alone, not of what was called before."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import ShardInputs
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import twice
from moe_conformance.suites.shard.cases import STATE
from moe_conformance.suites.shard.ranks import expected, name_of, part_of, ranks, unsharded, with_pairs


def another(inputs: ShardInputs) -> ShardInputs:
    """A layer of the same shape and of other values."""
    whole = inputs.whole
    tensors = {name: tensor.flip(0) for name, tensor in whole.tensors.items()}
    return with_pairs(inputs, x=whole.x.flip(0) * 3, ids=whole.ids.flip(0), tensors=tensors)


@check(STATE)
@torch.no_grad()
def test_another_call_between_leaves_no_trace(engine: Any, case: Case) -> None:
    """All ranks, all ranks of another layer, all ranks again: the same within rounding."""
    layer = unsharded(case)
    everybody = ranks(case, layer)
    first = [part_of(engine, inputs).clone() for inputs in everybody]
    for inputs in everybody:
        part_of(engine, another(inputs))
    bound = twice(expected(everybody[0])[1])
    for inputs, part in zip(everybody, first, strict=True):
        compare.close(f"{name_of(inputs)}, called again, against the first", part_of(engine, inputs), part, bound)
