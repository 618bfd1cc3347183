"""SGLang's adapter as far as it goes without SGLang: stand-ins, refusals, what is missing, how things are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_conformance.engine import MLPSpec, RoutingSpec, Unsupported
from moe_conformance.engines import sglang
from moe_conformance.engines.sglang import SGLang, SGLangCompiled, SGLangTriton, built, refusing, routing, stand_ins

ABSENT = "moe_conformance_has_no_such_package"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for a package that is nowhere."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, stand_ins._Finder((ABSENT,))])
    yield
    for name in [name for name in sys.modules if name.startswith(ABSENT)]:
        del sys.modules[name]


@pytest.mark.usefixtures("stand_in")
def test_a_stand_in_gives_names_modules_and_base_classes_and_computes_nothing() -> None:
    module: Any = importlib.import_module(f"{ABSENT}.kernels")
    base = module.Module
    assert type("Derived", (base,), {}).__mro__[1] is base
    assert isinstance(base.attribute, type)
    with pytest.raises(Unsupported, match=rf"{ABSENT}.kernels.silu_and_mul, which is absent here"):
        module.silu_and_mul(torch.ones(1), torch.ones(1))


@pytest.mark.usefixtures("stand_in")
def test_a_stand_in_may_be_the_type_of_a_field() -> None:
    pydantic = pytest.importorskip("pydantic")
    module: Any = importlib.import_module(f"{ABSENT}.kernels")
    model = pydantic.create_model("Model", tag=(module.StructuralTag | None, None))
    assert model(tag="x").tag == "x"


@pytest.mark.usefixtures("stand_in")
def test_a_stand_in_is_behind_every_package_that_is_there() -> None:
    finder = sys.meta_path[-1]
    assert isinstance(finder, stand_ins._Finder)
    finder.names = ("json",)
    assert getattr(importlib.import_module("json"), "loads")  # noqa: B009  mypy knows the real one


def test_only_absent_packages_have_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "NAMES", ("json", ABSENT))
    assert stand_ins.absent() == (ABSENT,)


@pytest.mark.parametrize("error", [NotImplementedError("no such form"), ImportError("no such package")])
def test_what_is_not_implemented_is_refused_in_its_words(error: Exception) -> None:
    with pytest.raises(Unsupported, match=f"SGLang: {error}"), refusing.refusals():
        raise error


def test_an_assertion_is_refused_by_its_line_or_stays_a_failure() -> None:
    swiglu_limit, got = 7, 2
    with pytest.raises(Unsupported, match="assert swiglu_limit == 10"), refusing.refusals():
        assert swiglu_limit == 10
    with pytest.raises(AssertionError), refusing.refusals():
        assert got == 1


def test_what_is_missing_is_said_with_a_line_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(sglang, "find_spec", lambda name: object() if name in there else None)
    assert "sglang is not installed" in str(SGLang.missing())
    there |= {"sglang", *sglang.PACKAGES} - {"zmq", "PIL"}
    assert str(SGLang.missing()).endswith("pip install pillow pyzmq")
    there |= {"zmq", "PIL"}
    assert SGLang.missing() is None


def test_a_cpus_experts_come_before_those_of_a_gpu_and_the_other_engines_have_one_kernel() -> None:
    assert SGLang.kernels == ("native", "triton")
    assert (SGLangCompiled.kernels, SGLangTriton.kernels) == (("compiled",), ("triton",))
    assert SGLangCompiled.stages == {"experts"}


SILU = MLPSpec(8)


@pytest.mark.parametrize(
    ("mlp", "asked"),
    [
        (SILU, {"activation": "silu"}),
        (replace(SILU, clamp="before", limit=10.0), {"activation": "silu", "swiglu_limit": 10.0}),
        (replace(SILU, clamp="after", limit=7.0), {"activation": "silu", "gemm1_clamp_limit": 7.0}),
        (
            replace(SILU, clamp="before", limit=7.0, alpha=1.702, up_offset=1.0),
            {"activation": "silu", "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
        ),
        (replace(SILU, weight_on="input"), {"activation": "silu", "apply_router_weight_on_input": True}),
    ],
)
def test_experts_are_asked_for_as_its_models_do(mlp: MLPSpec, asked: dict[str, Any]) -> None:
    assert built.words(mlp) == {"is_gated": True, "with_bias": False, **asked}


@pytest.mark.parametrize("mlp", [replace(SILU, activation="relu"), replace(SILU, weight_on="w2_input")])
def test_experts_that_no_model_has_are_refused(mlp: MLPSpec) -> None:
    with pytest.raises(Unsupported, match="experts: "):
        built.words(mlp)


def test_routers_are_asked_for_as_its_models_do() -> None:
    bias = {"router.selection_bias": torch.zeros(8)}
    groups = RoutingSpec(
        2, score="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="top2_sum", renormalize="sum"
    )
    asked = routing.arguments(replace(groups, scale=2.5), bias)
    assert (asked["num_expert_group"], asked["topk_group"], asked["use_grouped_topk"]) == (4, 2, True)
    assert (asked["routed_scaling_factor"], asked["apply_routed_scaling_factor_on_output"]) == (2.5, True)
    with pytest.raises(Unsupported, match="no model of SGLang's routes by"):
        routing.arguments(replace(groups, logit_scale=2.0), bias)
