"""Do both sides of a capturer find the sizes of the model, and refuse a config that has none?"""

from __future__ import annotations

from functools import partial

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Nonconformance
from moe_conformance.judging.compare import same
from moe_conformance.suites.capture_shape.cases import CAPTURED, REFUSED, SIDES
from moe_conformance.suites.describe.configs import config_of, refused_on_purpose


@check(CAPTURED)
def test_both_sides_of_capture_take_the_sizes_of_the_model(engine: Engine, case: Case) -> None:
    """A buffer has a place for each layer of the model, or for each MoE layer; both sides the same."""
    want = case["want"]
    layers = {want["layers"], want["moe_layers"]}
    shapes = {side: engine.capture_shape(config_of(case), side) for side in SIDES}
    for side, shape in shapes.items():
        if shape.layers not in layers:
            raise Nonconformance(f"{side}: layers: got {shape.layers}, want one of {sorted(layers)}")
        same(f"{side}: top_k", shape.top_k, want["top_k"])
        if shape.experts is not None:
            same(f"{side}: experts", shape.experts, want["experts"])
    same("layers of the reader", shapes["reader"].layers, shapes["worker"].layers)


@check(REFUSED)
def test_both_sides_of_capture_refuse_on_purpose(engine: Engine, case: Case) -> None:
    config = config_of(case)
    for side in SIDES:
        refused_on_purpose(side, partial(engine.capture_shape, config, side), case)
