"""The table of features: complete for the catalogue, and declined by the reference almost nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.catalogue.clauses import CLAUSES
from moe_conformance.engine import MLPSpec, QuantSpec, RouteInputs, RoutingSpec
from moe_conformance.engines.reference import Reference
from moe_conformance.protocol.features import FEATURES, complaints, is_known
from moe_conformance.protocol.limits import extent_of
from moe_conformance.protocol.stages import STAGES


def test_the_reference_declares_what_it_may_and_declines_only_other_implementations() -> None:
    """Whatever a case needs that the reference does not offer would be judged on nobody; it serves no whole models.

    Bits that do not depend on the batch are the kernels' to show: torch's products choose by the number of rows.
    """
    offered = Reference().capabilities()
    declined = {
        (case.id, word)
        for case in catalogue().values()
        if case.stage != "generate"
        for word in case.needs - offered[case.stage]
        if not word.startswith("implementation:") and word != "batch_invariant"
    }
    assert (declined, complaints(offered)) == (set(), [])


def test_the_reference_has_no_limits() -> None:
    assert Reference().limits() == {}


def test_a_word_stands_once_in_a_stage() -> None:
    pairs = [(stage, entry.word) for entry in FEATURES for stage in entry.stages]
    assert len(set(pairs)) == len(pairs) and {stage for stage, _ in pairs} <= set(STAGES)


@pytest.mark.parametrize(
    ("stage", "word", "known"),
    [
        ("block", "mixtral", True),
        ("block", "implementation:eager", True),
        ("block", "implementation:", False),
        ("block", "implementation:NAME", False),
        ("block", "MODEL_TYPE", False),
        ("route", "mixtral", False),
        ("route", "softmax", True),
        ("align", "softmax", False),
    ],
)
def test_a_word_in_capitals_stands_for_others(stage: str, word: str, known: bool) -> None:
    assert is_known(stage, word) is known


@pytest.mark.parametrize(
    ("stage", "recipe", "words"),
    [
        ("route", {"routing": RoutingSpec(1, score="sigmod")}, "got 'sigmod', which no stage has a feature for"),  # type: ignore[arg-type]
        ("route", {"routing": RoutingSpec(1, score="sigmod")}, "did you mean 'sigmoid'?"),  # type: ignore[arg-type]
        ("route", {"routing": RoutingSpec(1, selector="topK")}, "got 'topK'"),  # type: ignore[arg-type]
        ("route", {"routing": RoutingSpec(1, renormalize="yes")}, "got 'yes'"),  # type: ignore[arg-type]
        ("experts", {"mlp": MLPSpec(8, activation="swish")}, "got 'swish'"),  # type: ignore[arg-type]
        ("experts", {"quant": QuantSpec("fp8_e5m2", "tensor")}, "got 'quantised:fp8_e5m2'"),  # type: ignore[arg-type]
        ("route", {"needs": "softmax"}, "needs: got 'softmax', want a set of words"),
    ],
)
def test_a_spec_that_no_model_has_makes_no_case(stage: str, recipe: dict[str, Any], words: str) -> None:
    clause = next(key for key, clause in CLAUSES.items() if key.startswith(stage.rstrip("s")))
    with pytest.raises(ValueError) as refused:
        Case("a-case", stage=stage, clause=clause, recipe=recipe)
    assert words in str(refused.value)


def test_limits_count_experts_not_columns_of_logits() -> None:
    for routing, columns in (
        (RoutingSpec(1, identity_experts=64), 576),
        (RoutingSpec(1, selector="product_keys", select_on="logits"), 44),
        (RoutingSpec(1, shared_classes=2), 514),
        (RoutingSpec(1, skip_expert=True), 513),
    ):
        experts = extent_of(RouteInputs(torch.zeros(1, columns), routing))["experts"]
        assert (experts, routing.classes(experts)) == (484 if columns == 44 else 512, columns)
