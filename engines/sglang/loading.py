"""Loading of any family: SGLang's default loader into SGLang's own model, and what then lies in its MoE layers.

Of names, the parameter that each tensor ends up in, as a load of tensors that are told apart by their values shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import CheckpointName, Target, Unsupported, called_by_engine
from moe_conformance.engines import servers
from moe_conformance.engines.sglang import models, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import CheckpointError

EXPERTS: Mapping[str, str] = {
    "w13_weight": "w13", "w2_weight": "w2", "w13_weight_bias": "b13", "w2_weight_bias": "b2",
}  # fmt: skip


@torch.no_grad()
def load(folder: Path) -> Mapping[str, Tensor]:
    """The folder's MoE layers by canonical name, after SGLang's default loader read it into a model full of NaN.

    Raises CheckpointError where a parameter of them stays unwritten; what SGLang raises passes through.
    """
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat
    from sglang.srt.model_loader.loader import DefaultModelLoader

    _, values = models.as_published(json.loads((folder / "config.json").read_text()))
    built = _built(values)
    named = dict(_of_layers(built))
    loader = DefaultModelLoader(LoadConfig(load_format=LoadFormat.SAFETENSORS))
    source = DefaultModelLoader.Source(model_or_path=str(folder), revision=None)
    with runtime.building(torch.float32), refusals():
        built.model.load_weights(loader._get_weights_iterator(source))
    parameters = dict(built.model.named_parameters(remove_duplicate=False))
    if left := [name for name in named if servers.unwritten(parameters[name]).any()]:
        raise CheckpointError(f"load: got NaN in {', '.join(left)}, want every parameter written")
    return {key: _canonical(parameters[name], built, name).detach().clone() for name, key in named.items()}


def _built(values: dict[str, Any]) -> models.Built:
    with models.folder_of(values) as folder:
        built = models.build(folder, torch.float32)
    if not any(True for _ in built.moe_layers()):
        raise Unsupported(f"SGLang's {type(built.model).__name__} has no FusedMoE, but experts of its own")
    return built


def _of_layers(built: models.Built) -> Iterator[tuple[str, str]]:
    return servers.of_layers(built.model, built.moe_layers(), {}, EXPERTS, lambda experts: _config(experts).is_gated)


def _config(experts: Any) -> Any:
    return experts.moe_runner_config


def _canonical(parameter: Tensor, built: models.Built, name: str) -> Tensor:
    """Gate above up, in the width of the model: only gpt-oss's parameters have their rows in turns."""
    end = name.rpartition(".")[2]
    if end.startswith("w13"):
        layer = next(layer for layer in built.moe_layers() if name.startswith(f"{layer.path}.{layer.inner}."))
        config = _config(layer.experts)
        if config.gemm1_alpha is not None and config.activation == "silu" and config.gate_up_interleaved:
            return torch.cat((parameter[:, 0::2], parameter[:, 1::2]), dim=1)
    if end == "e_score_correction_bias":
        return parameter.flatten()
    return parameter


@torch.no_grad()
def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
    """The parameter that SGLang's loader writes each tensor to, and which expert and part of it.

    Every tensor has a value of its own throughout; where it lies afterwards is its target. Of Gemma 4, whose names are
    tried with suffixes of quantised weights, the calls of its weight_loaders are listened to instead.
    """
    record, values = models.as_published(config)
    built = _built(values)
    if record.model_type == "gemma4_text":
        return _heard(built, names)
    tensors = servers.told_apart(names)
    with runtime.building(torch.float32), refusals():
        built.model.load_weights(iter(tensors.items()))
    held = servers.held(built.model)
    if lost := [entry.name for value, entry in enumerate(names, 1) if value not in held]:
        raise CheckpointError(f"{', '.join(lost)}: got no parameter that it was loaded into, want one")
    return {entry.name: tuple(held[value]) for value, entry in enumerate(names, 1)}


def _heard(built: models.Built, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
    """What load_weights calls the loaders of parameters with. Experts are given a parameter for each suffix."""
    suffixes = {found[1] for entry in names if (found := re.search(r"\.experts\.\d+\.\w+_proj\.(\w+)$", entry.name))}
    for layer in built.moe_layers():
        for name in (f"{part}_{suffix}" for suffix in suffixes for part in ("w13", "w2")):
            if not hasattr(layer.experts, name):
                layer.experts.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))
    heard: dict[int, list[str | Target]] = {}
    for name, parameter in (*built.model.named_parameters(), *built.model.named_buffers()):
        parameter.weight_loader = _listener(name, heard)  # type: ignore[attr-defined]
    model: Any = built.model
    with refusals():
        model.load_weights(iter(servers.told_apart(names).items()))
    if lost := [entry.name for value, entry in enumerate(names, 1) if value not in heard]:
        raise CheckpointError(f"{', '.join(lost)}: got no parameter whose loader was called, want one")
    return {entry.name: tuple(heard[value]) for value, entry in enumerate(names, 1)}


def _listener(name: str, heard: dict[int, list[str | Target]]) -> Any:
    @called_by_engine
    def weight_loader(
        parameter: Tensor, loaded: Tensor, said: Any = None, shard_id: Any = None, expert_id: int | None = None
    ) -> None:
        """Loaders of experts are told a name, a part and an expert; those of linear layers a part."""
        targets = heard.setdefault(int(loaded.flatten()[0]), [])
        if expert_id is not None:
            targets.append(Target(name, expert_id, None if shard_id == "w2" else shard_id))
        else:
            targets.append(name if said is None else Target(name, None, said))

    return weight_loader
