"""Every slot and block in use is written, whatever was in the memory that they lie in."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.suites.align.cases import WRITTEN
from moe_conformance.suites.align.test_permutation import assert_placed


@check(WRITTEN)
def test_every_element_is_written(engine: Any, case: Case) -> None:
    """Fresh memory holds the largest integer, which in use is neither a pair nor a mark of padding."""
    assert_placed(engine, case)
