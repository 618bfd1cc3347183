"""What all checks of blocks do: run the engine, look at the form of its answer, compare its routing and its output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import BlockInputs, BlockOutput, LayerSpec, Routing
from moe_conformance.errors import CheckpointError, Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.oracle.layer import block_logits, block_routing, expected_block
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.block.blocks import inputs_of
from moe_conformance.suites.block.configs import spec_of


def answer(engine: Any, inputs: BlockInputs) -> BlockOutput:
    """The engine's answer, its output [T, H] in x's dtype."""
    try:
        got: BlockOutput = engine.block(to_device(inputs, engine.info.device))
    except CheckpointError as error:
        raise Nonconformance(f"the layer's tensors: refused ({error}), want all of them loaded") from error
    rows, hidden = inputs.x.shape[0] * inputs.x.shape[1], inputs.x.shape[2]
    compare.shape_and_type("block output", got.output, (rows, hidden), integer=False)
    compare.same("block output's dtype", str(got.output.dtype), str(inputs.x.dtype))
    return got


def reported(got: BlockOutput) -> Routing:
    """The routing that the engine reports, on the CPU."""
    if got.routing is None:
        raise Unsupported("block: the engine cannot tell how it routed")
    return Routing(
        compare.numbers("block: ids", got.routing[0], got.routing[0].shape, integer=True),
        compare.numbers("block: weights", got.routing[1], got.routing[0].shape, integer=False),
    )


def judge_router(inputs: BlockInputs, spec: LayerSpec, routing: Routing) -> Routing:
    """The routing must be one of the family's router; returns it with the weights that the experts' outputs get.

    An engine that scales after the experts reports weights without that scale.
    """
    logits, routed = block_logits(inputs, spec), block_routing(inputs, spec)
    try:
        judge_routing("block", routing, routed, logits)
    except Nonconformance:
        if spec.routing.scale == 1 or spec.routing.shared_classes:
            raise
        late = replace(routed, routing=replace(spec.routing, scale=1.0))
        try:
            judge_routing("block", routing, late, logits)
        except Nonconformance:
            pass
        else:
            return Routing(routing.ids, routing.weights.double() * spec.routing.scale)
        raise
    return routing


def scaled(inputs: BlockInputs, spec: LayerSpec, routing: Routing) -> Routing:
    """As `judge_router` returns it; a routing that is not the family's, which is for its routing check, as it is."""
    try:
        return judge_router(inputs, spec, routing)
    except Nonconformance:
        return routing


@torch.no_grad()
def judge_output(engine: Any, case: Case, given: Collection[str] | None = None) -> None:
    """The output is the exact one within what storing in x's dtype may cost.

    At the routing that the engine reports: whether that is the model's is for the routing check of the same family.
    """
    inputs, spec = inputs_of(case, given), spec_of(case["family"])
    got = answer(engine, inputs)
    routing = inputs.routing
    if routing is None and got.routing is not None:
        routing = scaled(inputs, spec, reported(got))
    want, bound = expected_block(inputs, spec, routing)
    compare.close("block output", got.output, want, bound)
