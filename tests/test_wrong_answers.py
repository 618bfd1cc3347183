"""An answer of the wrong form fails in every stage, with got and want, and is no error of the adapter's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_check import CHECKS
from torch import Tensor

from moe_conformance.engine import STAGES
from moe_conformance.engines.mutants.generate import Serves
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running.discovery import Target

Spoil = Callable[[Any], Any]

# Cases that look at the tensors of an answer; of some stages one looks at one part, another at the other.
CASES = {
    "describe": ("config-gemma4-hub",),
    "capture_shape": ("capture-shape-gemma4-hub",),
    "route": ("route-renorm-padding-rows",),
    "router_module": ("closure-gemma4-per-expert-scale-functional-call",),
    "align": ("align-e60-k6",),
    "experts": ("experts-padding", "experts-lora-three"),
    "layer": ("layer-tiny-plain",),
    "block": ("family-deepseek-v3-block", "family-deepseek-v3-route"),
    "capture_session": ("capture-dense-between", "capture-concatenated-spelled-out"),
    "capture_store": ("store-narrow-e128",),
    "expert_map": ("expert-map-contiguous-11-on-3",),
    "replicate": ("replicate-choice-two-copies", "replicate-load-two-copies"),
    "shard": ("shard-ep3-contiguous",),
    "exchange": ("exchange-arrivals", "exchange-ep3"),
    "remap": ("remap-gemma4-plain-every-suffix",),
    "load": ("load-gemma4-packed-one-file",),
    "update": ("update-qwen3-moe-once",),
    "generate": ("generate-qwen3-moe-routed",),
}
WHOLE: dict[str, Spoil] = {
    "None": lambda answer: None,
    "a number": lambda answer: 7,
    "a text": lambda answer: "right",
    "a tuple": lambda answer: (None,),
    "an object": lambda answer: object(),
}
TENSORS: dict[str, Spoil] = {
    "None": lambda tensor: None,
    "a list": lambda tensor: tensor.tolist(),
    "one more dim": lambda tensor: tensor[None, None],
    "another dtype": lambda tensor: tensor.long() if tensor.is_floating_point() else tensor.float(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
}
# What holds no tensor, or has it returned by a method.
WITHOUT = ("describe", "capture_shape", "remap")
BY_A_METHOD = ("router_module", "capture_session", "capture_store")


def of_tensors(spoil: Spoil, spared: int) -> Spoil:
    """Each tensor of an answer spoilt, but for so many first ones."""

    def whole(answer: Any) -> Any:
        number = itertools.count()

        def part(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value if next(number) < spared else spoil(value)
            if isinstance(value, dict):
                return {key: part(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                parts = [part(item) for item in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            return value

        return part(answer)

    return whole


class Spoils:
    """A session, a store or a reader whose reads are spoilt."""

    def __init__(self, real: Any, spoil: Spoil) -> None:
        self._real = real
        self.read = lambda *args: spoil(real.read(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Spoilt(Serves):
    """Right but for one stage."""

    stage, spoil, reads = "", staticmethod(lambda answer: answer), False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        own = type(self)
        if name != {"capture_store": "capture_reader"}.get(own.stage, own.stage):
            return found
        return lambda *args: own.spoil(found(*args)) if not own.reads else own.reading(found(*args))

    @classmethod
    def reading(cls, answer: Any) -> Any:
        if cls.stage != "router_module":
            return Spoils(answer, cls.spoil)
        answer.module.register_forward_hook(lambda module, given, answered: cls.spoil(answered))
        return answer


def assert_fails(monkeypatch: pytest.MonkeyPatch, stage: str, spoil: Spoil, reads: bool = False) -> None:
    monkeypatch.setattr(Spoilt, "stage", stage)
    monkeypatch.setattr(Spoilt, "spoil", staticmethod(spoil))
    monkeypatch.setattr(Spoilt, "reads", reads)
    judge = Judge(Target("spoilt", f"{__name__}:Spoilt"))
    judge.adapters = judge.adapters[1:]  # this file is the engine
    for row in CHECKS:
        if row[2].id in CASES[stage]:
            outcome = judge.run(*row)
            assert outcome.verdict is Verdict.FAIL, (row[2].id, row[1], outcome)
            assert "got " in outcome.message and "want " in outcome.message, outcome


def test_every_stage_has_its_cases() -> None:
    assert set(CASES) == set(STAGES)
    assert {name for names in CASES.values() for name in names} <= {case.id for _, _, case in CHECKS}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_of_another_type_fails(monkeypatch: pytest.MonkeyPatch, stage: str, kind: str) -> None:
    assert_fails(monkeypatch, stage, WHOLE[kind])


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in WITHOUT])
def test_tensors_of_another_form_fail(monkeypatch: pytest.MonkeyPatch, stage: str, kind: str) -> None:
    """The first output of an update is of a block to which nothing was pushed yet: that is another stage's."""
    spoil = of_tensors(TENSORS[kind], 1 if stage == "update" else 0)
    assert_fails(monkeypatch, stage, spoil, stage in BY_A_METHOD)
