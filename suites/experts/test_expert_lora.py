"""Each token has the update of its own adapter at each of its experts, and of no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.repeats import assert_repeats
from moe_conformance.oracle.experts import expected_experts
from moe_conformance.suites.experts.inputs import inputs_of
from moe_conformance.suites.experts.judging import answer, assert_sum
from moe_conformance.suites.experts.stored import LORA_CASES


@check(LORA_CASES)
@torch.no_grad()
def test_tokens_have_the_update_of_their_own_adapter(engine: Any, case: Case) -> None:
    """Gate, up and down of every expert, scaled once; experts without an update have that of their weights alone."""
    assert_sum(engine, inputs_of(case))


@check(case for case in LORA_CASES if case["none"])
@torch.no_grad()
def test_a_token_without_adapter_is_as_if_there_were_none(engine: Any, case: Case) -> None:
    """Adapters that are not a number, where no token asks for them, change nothing either."""
    inputs = inputs_of(case)
    assert inputs.lora is not None
    without = inputs.lora.adapters < 0
    poisoned = {name: torch.full_like(tensor, float("nan")) for name, tensor in inputs.lora.tensors.items()}
    nobody = replace(inputs.lora, tensors=poisoned, adapters=torch.full_like(inputs.lora.adapters, -1))
    alone = answer(engine, replace(inputs, lora=nobody), "routed sum without adapters")[without]
    bound = expected_experts(replace(inputs, lora=None))[1]
    kept = replace(bound, limit=bound.limit[without])
    what = "routed sum of tokens without an adapter"
    assert_repeats(what, engine, "experts", answer(engine, inputs, what)[without], alone, kept)
