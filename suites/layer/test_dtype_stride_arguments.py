"""Layers read x, logits and tensors as they are given, or refuse them."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.catalogue.case import Case, check
from moe_conformance.judging.layouts import assert_honoured
from moe_conformance.suites.layer.cases import ARGUMENT_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import assert_output


@check(ARGUMENT_CASES)
@torch.no_grad()
def test_arguments_are_read_as_given(engine: Any, case: Case) -> None:
    """The output is the exact one; where it is not, the first argument to blame is named."""

    def judge(given: Any) -> None:
        assert_output(engine, inputs_of(case, given))

    assert_honoured("layer", case["arguments"], judge)
