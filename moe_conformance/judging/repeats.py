"""The same call again: the same bits, or for an engine that sums with atomics the same within rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import Bound, twice


def assert_repeats(what: str, engine: Any, stage: str, again: Tensor, first: Tensor, bound: Bound) -> None:
    """Raise Nonconformance unless a repeated call of a stage gave what it gave first.

    bound: how far each answer may be from the exact value, so two may differ by twice that. Used only if the engine
    does not offer "same_bits".
    """
    if "same_bits" in engine.capabilities()[stage]:
        compare.equal(what, again, first)
    else:
        compare.close(what, again, first, twice(bound))
