"""`checkpoint --vllm` and `--sglang`: what is seen of a loader that copies nothing; the real ones where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoint_folders import config_of, floats, write
from torch import Tensor, nn

from moe_conformance.checkpoints import mapped
from moe_conformance.checkpoints.command import judged
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.engines.traced import Server, traced
from moe_conformance.errors import UsageError


class Model(nn.Module):
    """As servers' models: gate and up in one parameter, experts in another, and a scale that is read as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2, 8, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.empty(4), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(1), requires_grad=False)
        self.register_buffer("kept", torch.zeros(4, device="cpu"))  # as some are made, whatever the device

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in list(weights):
            self.take(name, tensor)

    def take(self, name: str, tensor: Tensor) -> None:
        if name.startswith("expert."):
            _, number, part = name.split(".")
            at = {"gate": slice(4), "up": slice(4, 8)}[part]
            self.w13.data[int(number)][at].copy_(tensor.t().contiguous().t().to(torch.float32).cpu())
        elif name == "scale":
            self.scale.data.fill_(tensor.item())
        elif name in ("norm", "kept"):
            getattr(self, name).data.copy_(tensor)
        elif name == "attention":
            raise KeyError(name)


class Streaming(Model):
    """Takes one after the other, as a loader must by whose place in the stream an error is told."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.take(name, tensor)


SHAPES = {f"expert.{number}.{part}": (4, 4) for number in (0, 1) for part in ("gate", "up")}
SHAPES |= {"norm": (4,), "scale": (1,), "kept": (4,)}


def found(names: Iterable[str], model: Callable[[], nn.Module] = Streaming, absent: Iterable[str] = ()) -> object:
    stored = {name: Stored(name, "x", "BF16", SHAPES.get(name, (4,)), 0, 0) for name in names}
    with torch.device("meta"):
        server = Server(model(), nullcontext, lambda error: str(error), frozenset(absent))
    result = traced(server, stored)
    return {name: value for name, value in vars(result).items() if value}


@pytest.mark.parametrize("model", [Model, Streaming])
def test_nothing_is_said_of_names_that_a_loader_takes(model: Callable[[], nn.Module]) -> None:
    assert found(SHAPES, model) == {}


def test_a_name_that_goes_nowhere_is_unmapped() -> None:
    assert found([*SHAPES, "draft.norm"]) == {"unmapped": ["draft.norm"]}
    assert found([*SHAPES, "vision.norm"], absent=["vision"]) == {}


def test_a_parameter_that_nothing_fills_is_told_from_one_that_is_filled_in_part() -> None:
    assert found([name for name in SHAPES if name not in ("norm", "expert.1.up")]) == {
        "unfilled": ["norm"],
        "partial": ["w13"],
    }


def test_a_name_at_which_the_loader_raises_is_named_and_the_rest_loaded() -> None:
    assert found(["attention", *SHAPES]) == {"raised": [("attention", "KeyError: 'attention'")]}


def test_a_loader_that_raises_when_it_has_all_names_is_not_judged() -> None:
    assert found(["attention", *SHAPES], Model) == {"why": "KeyError: 'attention'"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", config_of("qwen3_moe"), floats("qwen3_moe"))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_an_engine_that_is_not_installed_is_wrong_usage(
    engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "find_spec", lambda name: None if name == engine else find_spec(name))
    with pytest.raises(UsageError, match=f"--{engine}: {engine} is not installed here"):
        judged(folder, engines=[engine])


def test_a_process_that_dies_is_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an engine that crashes; the rest is judged all the same."""
    monkeypatch.setattr(mapped, "ask", lambda engines: None)
    monkeypatch.setitem(mapped.SERVERS, "absent", "Absent")  # type: ignore[index]
    monkeypatch.setattr(mapped, "_environment", lambda engine: {})
    (note,) = judged(folder, engines=["absent"]).findings
    assert (note.kind, note.level) == ("engine", "note")
    assert "its process ended with exit code 1: ModuleNotFoundError" in note.got


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_real_loaders_take_what_transformers_wrote_and_name_what_is_planted(engine: str, tmp_path: Path) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed here; its jobs have environments of their own")
    import tiny_models
    from safetensors.torch import load_file, save_file

    tiny_models.build("qwen3_moe").save_pretrained(tmp_path)
    assert judged(tmp_path, engines=[engine]).findings == ()
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost, renamed = "model.layers.2.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(renamed)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    said = {(one.kind, name): one.level for one in judged(tmp_path, engines=[engine]).findings for name in one.tensors}
    other = ("refused", "defect") if engine == "vllm" else ("unmapped", "note")
    assert said == {
        ("unfilled", lost): "defect",
        ("unfilled", "model.layers.1.self_attn.qkv_proj.weight"): "defect",
        (other[0], "model.layers.1.self_attn.query.weight"): other[1],
    }
