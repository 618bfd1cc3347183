"""The reference as an engine: it offers everything that any case may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_check import CHECKS

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engine import CaptureSpec, LogitsSpec, RouterSpec, RoutingSpec, Rows
from moe_conformance.engines.reference import Reference, ReferenceOnGPU
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.model.families.families import RECORDS
from moe_conformance.protocol.features import complaints, words
from moe_conformance.protocol.stages import STAGES
from moe_conformance.running.discovery import Target

OFFERED = Reference().capabilities()
# What products of torch on a CPU do not give: their bits vary with the batch. Whole models, with attention, are not its
# matter either. Of two ways to be told of padding it has one.
DECLINED = {"batch_invariant", "counted_padding"}


def test_every_feature_of_every_stage_is_offered() -> None:
    assert complaints(OFFERED) == []
    assert [*OFFERED, "generate"] == list(STAGES)
    for stage in OFFERED:
        stand_ins = {"MODEL_TYPE", "implementation:NAME"}
        assert words(stage).keys() - OFFERED[stage] <= stand_ins | DECLINED, stage
    assert set(RECORDS) <= OFFERED["block"]


def test_no_case_asks_for_what_the_reference_does_not_offer() -> None:
    """But for what it declines, and experts computed by another implementation, which it has none of."""
    for case in catalogue().values():
        lacking = case.needs - OFFERED[case.stage] if case.stage in OFFERED else ()
        assert all(word in DECLINED or word.startswith("implementation:") for word in lacking), (case.id, lacking)


def test_it_has_no_limits() -> None:
    assert Reference().limits() == {}


def elsewhere(stage: str) -> Callable[..., Any]:
    """The stage in a process where what names no device is made on another than its inputs, as on a GPU."""

    def call(self: Reference, *given: Any) -> Any:
        with torch.device("meta"):
            return getattr(Reference, stage)(self, *given)

    return call


class Elsewhere(Reference):
    name = "elsewhere"
    route, align, experts, layer, block, shard, replicate = map(
        elsewhere, ("route", "align", "experts", "layer", "block", "shard", "replicate")
    )


@pytest.mark.parametrize("stage", ("route", "align", "experts", "layer", "block", "shard", "replicate"))
def test_a_stage_computes_where_its_inputs_are(stage: str) -> None:
    judge = Judge(Target("elsewhere", f"{__name__}:Elsewhere"))
    # Dynamo does not trace the device that stands for another.
    checks = [check for check in CHECKS if check[2].stage == stage and not check[2].id.startswith("trace-")]
    smoke = [check for check in checks if check[2].tier == "smoke" and not check[2].needs & DECLINED]
    assert smoke
    for module, name, case in smoke:
        assert judge.run(module, name, case).verdict is Verdict.PASS, (name, case.id)


class OnMeta(Reference):
    device = "meta"


def test_what_it_keeps_is_on_its_device() -> None:
    """A router's tensors and a capturer's buffer; all other stages get theirs there."""
    engine, routing = OnMeta(), RoutingSpec(2, selection_bias=True)
    spec = RouterSpec(LogitsSpec(), routing, hidden_size=4, num_experts=3, dtype=torch.float32)
    router = engine.router_module(spec).module
    tensors = [*router.parameters(), *router.buffers()]
    session = engine.capture_session(CaptureSpec(max_tokens=2, layers=1, top_k=2, experts=3))
    session.capture(0, torch.zeros(2, 2, dtype=torch.int32), Rows("local", (2,)))
    assert engine.info.device == "meta" and len(tensors) == 2
    assert {tensor.device.type for tensor in (*tensors, session.buffer)} == {"meta"}
    assert ReferenceOnGPU().info.device == "cuda"
