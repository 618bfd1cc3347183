"""The ranks' parts sum to the layer, however many tokens there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_holds
from moe_conformance.suites.shard.cases import CHUNKS
from moe_conformance.suites.shard.ranks import judge_sum, ranks, unsharded

# Fewer than any chunk has.
FEW = 16


@check(CHUNKS)
@torch.no_grad()
def test_any_number_of_tokens_is_computed(engine: Any, case: Case) -> None:
    """Parts sum to the layer, as they do of the first few tokens."""
    few = replace(case, recipe={**case.recipe, "T": FEW})

    def judge(many: bool) -> None:
        layer = unsharded(case if many else few)
        judge_sum(engine, "sum of the ranks' parts", layer, ranks(case, layer))

    assert_holds("shard", f"{case['T']} tokens", judge)
