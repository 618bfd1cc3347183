"""A block that runs and is pushed weights: the reference's own, and what the suite asks of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from every_check import CHECKS, verdict
from torch import Tensor

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engine import UpdateInputs
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import InputError
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.reference_impl.block import block
from moe_conformance.reference_impl.update import RunningBlock, update
from moe_conformance.running.discovery import Target
from moe_conformance.suites.update.inputs import inputs_of

CASE = catalogue()["update-qwen3-moe-experts-then-router"]


def test_outputs_are_those_of_blocks_that_never_had_other_tensors() -> None:
    inputs = inputs_of(CASE)
    first, second, third = update(inputs)
    experts, router = inputs.pushes
    held = {**inputs.block.tensors, **experts}
    assert first.equal(block(inputs.block).output)
    assert second.equal(block(replace(inputs.block, tensors=held)).output)
    assert third.equal(block(replace(inputs.block, tensors={**held, **router})).output)
    assert not first.equal(second) and not second.equal(third)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_push_that_does_not_fit_changes_nothing(replaces: bool) -> None:
    inputs = inputs_of(CASE)
    running = RunningBlock(inputs.block)
    before = running.output()
    w2 = torch.zeros_like(inputs.block.tensors["experts.w2"])
    for stranger, words in (
        ({"experts.w2": w2, "experts.w4": w2}, "experts.w4: got no tensor of this name, want one of experts.w13"),
        ({"experts.w2": w2, "experts.w13": w2}, r"experts.w13: got \[.*\], want \["),
    ):
        with pytest.raises(InputError, match=words):
            running.push(stranger, replaces)
    assert running.output().equal(before)


def test_what_is_pushed_is_kept_in_the_blocks_own_dtype_and_apart_from_the_push() -> None:
    inputs = inputs_of(catalogue()["update-qwen3-moe-wide-push-bf16"])
    running = RunningBlock(inputs.block)
    push = {name: tensor.clone() for name, tensor in inputs.pushes[0].items()}
    running.push(push, replaces=False)
    assert {tensor.dtype for tensor in running.tensors.values()} == {torch.bfloat16}
    before = running.output()
    for tensor in push.values():
        tensor.zero_()
    assert running.output().equal(before)


class WrongFromTheStart(Reference):
    name = "wrong-from-the-start"

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        return [output + 1 for output in super().update(inputs)]


def test_a_block_that_was_wrong_before_any_push_is_not_judged_here() -> None:
    judge = Judge(Target("wrong", f"{__name__}:WrongFromTheStart"))
    (row,) = (row for row in CHECKS if row[2] is CASE)
    assert verdict(judge, *row) is Verdict.UNSUPPORTED


@pytest.mark.parametrize("case", ["again-and-again", "experts-then-router", "replaced"])
def test_transformers_computes_with_what_was_pushed(case: str) -> None:
    judge = Judge(Target("transformers", "moe_conformance.engines.transformers:Transformers"))
    (row,) = (row for row in CHECKS if row[2].id == f"update-qwen3-moe-{case}")
    assert verdict(judge, *row) is Verdict.PASS
