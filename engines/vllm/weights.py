"""Names of Gemma 4, through vLLM's own mapping, whatever suffix they have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_conformance.engine import CheckpointName, called_by_engine
from moe_conformance.engines.vllm import models, runtime

Named = Iterable[tuple[str, Tensor]]
# vLLM's shard ids of a gated expert, in the words of a checkpoint.
SHARDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class _Listener:
    """Stands for AutoWeightsLoader: maps names as it does, and writes down what it would load."""

    heard: list[tuple[str, Tensor]]

    def __init__(self, module: nn.Module, **_: Any) -> None:
        pass

    @called_by_engine
    def load_weights(self, weights: Named, *, mapper: Any = None) -> set[str]:
        self.heard.extend(weights if mapper is None else mapper.apply(weights))
        return set()


def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
    """The names under which vLLM loads each tensor, one for each expert and part where it splits a packed one.

    A name that ends in an expert's projection is given its `.weight`: vLLM's loaders take both for one.
    """
    with runtime.config_folder(config) as folder:
        vllm_config = models.engine_config(folder, "float32")
        model = _model(vllm_config, "meta")
        mapped = {}
        for entry in names:
            tensor = torch.empty(entry.shape, device="meta")
            found = [name for name, _ in _heard(model, vllm_config, entry.name, tensor)]
            mapped[entry.name] = tuple(re.sub(r"\.experts\.\d+\.\w+_proj$", r"\g<0>.weight", name) for name in found)
    return mapped


def _model(vllm_config: Any, device: str) -> Any:
    from vllm.model_executor.models import gemma4

    with runtime.building(vllm_config, torch.float32), torch.device(device):
        return gemma4.Gemma4ForCausalLM(vllm_config=vllm_config)


def _heard(model: Any, vllm_config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What vLLM makes of one tensor on its way down: wrapper, model, decoder, experts."""
    weights: Named = [(name, tensor)]
    if hasattr(vllm_config.model_config.hf_config, "text_config"):
        from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration as Wrapper

        weights = [(n.removeprefix("language_model."), t) for n, t in Wrapper.hf_to_vllm_mapper.apply(weights)]
    weights = _listen(model.load_weights, weights)
    if "AutoWeightsLoader" in type(model.model).load_weights.__code__.co_names:
        inner = [(n.removeprefix("model."), t) for n, t in weights if n.startswith("model.")]
        outer = [(n, t) for n, t in weights if not n.startswith("model.")]
        weights = [*outer, *((f"model.{n}", t) for n, t in _listen(model.model.load_weights, inner))]
    for found, part in weights:
        yield from _expert_names(model, found, part)


def _listen(load: Any, weights: Named) -> list[tuple[str, Tensor]]:
    from vllm.model_executor.models import gemma4

    heard: list[tuple[str, Tensor]] = []
    with patch.object(gemma4, "AutoWeightsLoader", type("Listener", (_Listener,), {"heard": heard})):
        load(iter(weights))
    return heard


def _expert_names(model: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A packed tensor that is split by the expert layer's own load_weights; any other name as it is."""
    path, _, rest = name.rpartition(".experts.")
    packed = re.fullmatch(r"(?:gate_up|down)_proj(?:\.(\w+))?", rest)
    try:
        layer = model.get_submodule(f"{path}.experts.routed_experts") if packed else None
    except AttributeError:
        layer = None
    if packed is None or layer is None or not hasattr(layer, "load_weights"):
        return [(name, tensor)]
    suffix, found = packed[1] or "weight", []

    @called_by_engine
    def weight_loader(*, loaded_weight: Tensor, shard_id: str, expert_id: int, **_: Any) -> bool:
        found.append((f"{path}.experts.{expert_id}.{SHARDS[shard_id]}.{suffix}", loaded_weight))
        return True

    parameters: dict[str, Any] = dict(layer.named_parameters(recurse=False))
    loaders = {n: p.weight_loader for n, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.weight_loader = weight_loader
        list(layer.load_weights([(rest, tensor)]))
    finally:
        for n, parameter in parameters.items():
            parameter.weight_loader = loaders[n]
    return found
