"""What a config says about its experts, read from the model that vLLM builds from it; config keys are not consulted.

Counts and widths are those of the expert layers (`moe_config`), of the shared experts' modules, and of vLLM's own
ModelConfig. Where a model has its interface for load balancing (`MixtureOfExperts`), its counts are what it says there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moe_conformance.engine import Absent, DenseModelError, MoESpec, Unsupported
from moe_conformance.engines import published, servers
from moe_conformance.engines.servers import MoELayer
from moe_conformance.engines.vllm import block, models, registry, runtime
from moe_conformance.engines.vllm.refusing import all_of

# Words of models whose constructor refuses a config without experts.
_DENSE = r"RuntimeError: No \w+ layer found in"
# Inkling's, stacked.
_SINKS = "sink_experts"


def features() -> frozenset[str]:
    """Not "refusals": what a config does not say has the default of its class. Not "layers": vLLM has no words for it.

    Raises ImportError for releases whose expert layers do not say their sizes.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    if not {"num_experts", "experts_per_token", "hidden_dim"} <= FusedMoEConfig.__dataclass_fields__.keys():
        raise ImportError("FusedMoEConfig has no sizes")
    return frozenset()


def describe(config: Any) -> MoESpec:
    """config: a transformers config or its dict. Raises DenseModelError where no layer of the model has experts.

    A config object reaches vLLM as the config.json that is saved of it.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return _described(json.dumps(values, sort_keys=True, default=str))


# One: a config is described as an object and in its saved form, one after the other.
@lru_cache(maxsize=1)
def _described(text: str) -> MoESpec:
    runtime.start()
    values = json.loads(text)
    if published.record_of(values) is None:
        return _of_no_family(values)
    record, written = models.as_published(values)
    if published.is_lossy(record, published.leveled(record, values)) and not registry.reads(record, "mlp_layer_types"):
        raise Absent(
            f"describe: config.json of {record.model_type} says how many of the first layers are dense, and those of "
            "this config are not the first; vLLM reads no list of them"
        )
    with models.folder_of(record, written) as folder:
        return _of_folder(folder, record.model_type)


def _of_no_family(values: dict[str, Any]) -> MoESpec:
    with runtime.config_folder(values) as folder:
        return _of_folder(folder, values["model_type"])


def _of_folder(folder: Path, model_type: str) -> MoESpec:
    try:
        built = _built(folder)
    except Unsupported as refusal:
        if re.search(_DENSE, str(refusal)):
            raise DenseModelError(f"{model_type}: {refusal}") from refusal
        raise
    return _spec(built, model_type)


def _built(folder: Path) -> models.Built:
    """The model without memory; one that has no experts for a CPU as it is on a GPU, or in the dtype that it wants."""
    refused = []
    here, gpu, *_ = block.PLATFORMS
    for platform, dtype in ((here, torch.float32), (gpu, torch.float32), (here, torch.bfloat16)):
        try:
            with block.as_on(platform, dtype):
                return models.build(folder, dtype, runs=False, where="meta")
        except Unsupported as refusal:
            refused.append(refusal)
    raise all_of(refused)


def _spec(built: models.Built, model_type: str) -> MoESpec:
    model: Any = built.model
    said, layers = built.config.model_config, list(built.moe_layers())
    if not layers:
        raise DenseModelError(
            f"{model_type}: vLLM's {type(model).__name__} of this config has no expert layer among its "
            f"{said.get_total_num_hidden_layers()} layers; it is a dense model, or the key that makes it a Mixture of "
            "Experts is off"
        )
    configs = [_config(layer) for layer in layers]
    hidden, width = said.get_hidden_size(), configs[0].hidden_dim
    shared, shared_width = _shared(built, layers[0])
    return MoESpec(
        num_layers=said.get_total_num_hidden_layers(),
        moe_layers=tuple(dict.fromkeys(layer.number for layer in layers)),
        num_experts=servers.one_or_each([_experts(model, layer) for layer in layers]),
        top_k=servers.one_or_each([config.experts_per_token for config in configs]),
        hidden_size=hidden,
        moe_intermediate_size=servers.one_or_each([config.intermediate_size_per_partition for config in configs]),
        shared_experts=getattr(model, "num_shared_experts", None) or shared,
        shared_intermediate_size=shared_width,
        latent_size=width if width != hidden else None,
    )


def _config(layer: MoELayer) -> Any:
    return layer.experts.moe_config


def _experts(model: Any, layer: MoELayer) -> int:
    """As the model says it, or its layer; with those that pass their input on, which its router's bias is for, too."""
    router: Any = getattr(layer.experts, "router", None)
    if hasattr(router, "zero_expert_type"):
        return len(router.e_score_correction_bias)
    return int(getattr(model, "num_logical_experts", None) or _config(layer).num_experts)


def _shared(built: models.Built, layer: MoELayer) -> tuple[int, int | None]:
    """(how many always-on experts, their summed width)."""
    whole = built.model.get_submodule(layer.path)
    module: Any
    for name, module in whole.named_modules():
        if name.endswith(_SINKS):
            return module.n_experts, module.w2_weight.shape[1]
    return servers.shared_experts(whole, _config(layer).intermediate_size_per_partition)
