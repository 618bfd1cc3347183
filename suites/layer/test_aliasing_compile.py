"""A layer leaves its inputs alone, hands out memory that is nobody else's, and is traced as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_conformance.catalogue.case import Case, check
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.judging.memory import assert_own, assert_unchanged
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.layer.cases import FAKE_CASES, OWN_MEMORY_CASES, UNCHANGED_CASES
from moe_conformance.suites.layer.inputs import inputs_of


@check(UNCHANGED_CASES)
@torch.no_grad()
def test_inputs_are_left_as_they_were(engine: Any, case: Case) -> None:
    """Each tensor of the call has its bytes afterwards, and after a second call."""
    assert_unchanged("layer", engine.layer, to_device(inputs_of(case), engine.info.device))


@check(OWN_MEMORY_CASES)
@torch.no_grad()
def test_what_is_returned_is_the_callers(engine: Any, case: Case) -> None:
    """The answer shares no memory with inputs, and keeps its values when the next is computed."""
    inputs = to_device(inputs_of(case), engine.info.device)
    assert_own("layer", engine.layer, inputs, replace(inputs, x=inputs.x.flip(0) * 3))


@check(FAKE_CASES)
@torch.no_grad()
def test_a_fake_output_is_like_a_real_one(engine: Any, case: Case) -> None:
    """Shape, dtype and strides under FakeTensorMode are those of a real call, and the memory is nobody else's."""
    inputs = to_device(inputs_of(case), engine.info.device)
    real = engine.layer(inputs)
    mode = FakeTensorMode()
    fake = replace(
        inputs,
        x=mode.from_tensor(inputs.x),
        logits=mode.from_tensor(inputs.logits),
        tensors={name: mode.from_tensor(tensor) for name, tensor in inputs.tensors.items()},
    )
    with mode:
        got = engine.raw.layer(fake)  # not guarded: the guard would be traced
    compare.same("dtype of the layer's fake output", str(got.dtype), str(real.dtype))
    compare.same("shape of the layer's fake output", [int(size) for size in got.shape], list(real.shape))
    compare.same("strides of the layer's fake output", [int(step) for step in got.stride()], list(real.stride()))
    for name, tensor in {"x": fake.x, "logits": fake.logits, **fake.tensors}.items():
        if got.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            raise Nonconformance(f"layer's fake output lies in the memory of the input {name}; return a new tensor")
