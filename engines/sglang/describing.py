"""What a config says about its experts, read from the model that SGLang builds from it; config keys are not consulted.

Counts and widths are those of the expert layers and of the shared experts' modules; the number of layers and the hidden
size are those of SGLang's own ModelConfig.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from moe_conformance.engine import Absent, DenseModelError, MoESpec, Unsupported
from moe_conformance.engines import published, servers
from moe_conformance.engines.servers import MoELayer
from moe_conformance.engines.sglang import models, runtime

# Families whose class in SGLang counts the first dense layers, and reads no list of kinds.
_COUNTED = ("cohere2_moe",)


def features() -> frozenset[str]:
    """Not "refusals": what a config omits has the default of its class. Not "layers": SGLang has no words for it.

    Raises ImportError for releases whose expert layers do not say their sizes.
    """
    from sglang.srt.layers.moe import MoeRunnerConfig

    if not {"num_experts", "top_k", "intermediate_size_per_partition"} <= MoeRunnerConfig.__dataclass_fields__.keys():
        raise ImportError("MoeRunnerConfig has no sizes")
    return frozenset()


def describe(config: Any) -> MoESpec:
    """config: a transformers config or its dict. Raises DenseModelError where no layer of the model has experts.

    A config object reaches SGLang as the config.json that is saved of it.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return _described(json.dumps(values, sort_keys=True, default=str))


# One: a config is described as an object and in its saved form, one after the other.
@lru_cache(maxsize=1)
def _described(text: str) -> MoESpec:
    runtime.start()
    values = json.loads(text)
    if (record := published.record_of(values)) is None:
        written = _of_no_family(values)
    else:
        record, written = models.as_published(values, falls=True)
        if published.is_lossy(record, published.leveled(record, values)) or _is_lossy(record.model_type, values):
            raise Absent(
                f"describe: config.json of {record.model_type} says how many of the first layers are dense, and those "
                "of this config are not the first; SGLang reads no list of them"
            )
    with models.folder_of(written) as folder:
        return _spec(models.build(folder, torch.float32, where="meta"), values["model_type"])


def _is_lossy(model_type: str, values: Mapping[str, Any]) -> bool:
    """The same of a family whose list of layers SGLang alone does not read."""
    types = list(values.get("mlp_layer_types") or ()) if model_type in _COUNTED else []
    return "dense" in types[[*types, "sparse"].index("sparse") :]


def _of_no_family(values: dict[str, Any]) -> dict[str, Any]:
    named = [name for name in published.architectures_of(values["model_type"]) if name in models.known()]
    if not named:
        raise Unsupported(f"SGLang has no class for model type {values['model_type']!r}")
    models.register(named[0])
    return {**values, "architectures": named[:1]}


def _spec(built: models.Built, model_type: str) -> MoESpec:
    layers = list(built.moe_layers())
    number = built.config.num_hidden_layers
    if not layers:
        if any(name.endswith(".experts") for name, _ in built.model.named_modules()):
            raise Unsupported(f"SGLang's {type(built.model).__name__} has no FusedMoE, but experts of its own")
        raise DenseModelError(
            f"{model_type}: SGLang's {type(built.model).__name__} of this config has no expert layer among its "
            f"{number} layers; it is a dense model, or the key that makes it a Mixture of Experts is off"
        )
    configs = [_config(layer) for layer in layers]
    hidden, width = built.config.hidden_size, configs[0].hidden_size
    shared, shared_width = _shared(built, layers[0])
    return MoESpec(
        num_layers=number,
        moe_layers=tuple(dict.fromkeys(layer.number for layer in layers)),
        num_experts=servers.one_or_each([_experts(built, layer) for layer in layers]),
        top_k=servers.one_or_each([_top_k(built, layer) for layer in layers]),
        hidden_size=hidden,
        moe_intermediate_size=servers.one_or_each([config.intermediate_size_per_partition for config in configs]),
        shared_experts=shared,
        shared_intermediate_size=shared_width,
        latent_size=width if width != hidden else None,
    )


def _config(layer: MoELayer) -> Any:
    return layer.experts.moe_runner_config


def _block(built: models.Built, layer: MoELayer) -> nn.Module:
    return built.model.get_submodule(f"{layer.path}.{layer.inner}".rpartition(".")[0])


def _top_k(built: models.Built, layer: MoELayer) -> int:
    """As its layer says it, or the router beside it."""
    from sglang.srt.layers.moe.topk import TopK

    config = _config(layer)
    said = [part.topk_config.top_k for part in _block(built, layer).modules() if isinstance(part, TopK)]
    top_k = config.top_k or next(iter(said), None)
    if top_k is None:
        raise Unsupported(f"describe: SGLang's {type(built.model).__name__} has its top-k in no module")
    return int(top_k - config.num_fused_shared_experts)


def _experts(built: models.Built, layer: MoELayer) -> int:
    """As its layer says it; with those that pass their input on, which its block counts beside them."""
    block, config = _block(built, layer), _config(layer)
    return int(config.num_experts - config.num_fused_shared_experts + (getattr(block, "zero_expert_num", 0) or 0))


def _shared(built: models.Built, layer: MoELayer) -> tuple[int, int | None]:
    """(how many always-on experts, their summed width)."""
    one = _config(layer).intermediate_size_per_partition
    if fused := _config(layer).num_fused_shared_experts:
        return fused, fused * one
    return servers.shared_experts(built.model.get_submodule(layer.path), one)
