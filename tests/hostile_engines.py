"""The adapter of tests/hostile_library.py, and a check for each of its kinds: the same, told what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hostile_library import ENDING, KINDS
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import LayerInputs
from moe_conformance.engines.reference import Reference
from moe_conformance.suites.layer.test_shape_mismatch import test_padding_never_reaches_the_output as check


class Hostile(Reference):
    name = "hostile"
    kind = ""

    def layer(self, inputs: LayerInputs) -> Any:
        if self.kind in KINDS or self.kind in ENDING:
            return (KINDS | ENDING)[self.kind].act(inputs, super().layer)
        return super().layer(inputs)


def __getattr__(name: str) -> Callable[[Any, Case], Any]:
    def as_told(engine: Any, case: Case) -> Tensor:
        engine.raw.kind = name
        return check(engine, case)

    return as_told
