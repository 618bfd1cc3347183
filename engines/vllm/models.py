"""vLLM's own model of a config, in small: its class, built by its own code on this machine.

The config goes through a config.json, as a published one does. Whatever the model is made of beside its MoE layers is
built as it comes, and nothing is put through it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from moe_conformance.engine import Absent, Unsupported
from moe_conformance.engines import published, servers
from moe_conformance.engines.servers import MoELayer
from moe_conformance.engines.vllm import absent, device, registry, runtime
from moe_conformance.engines.vllm.refusing import said

# No config that is judged has fewer positions.
MAX_LENGTH = 64


class Built(NamedTuple):
    """A model and its VllmConfig."""

    model: nn.Module
    config: Any

    def moe_layers(self) -> Iterator[MoELayer]:
        """Its decoder layers that have routed experts, in order."""
        for path, module in self.model.named_modules():
            if is_experts(module) and (match := re.match(r"(.*\.(\d+))\.(.+)$", path)):
                yield MoELayer(int(match[2]), match[1], match[3], module)


def is_experts(module: nn.Module) -> bool:
    """Whether this is vLLM's expert layer: MoERunner, or up to 0.26 FusedMoE and what derives from it."""
    from vllm.model_executor.layers import fused_moe

    old = getattr(fused_moe, "FusedMoE", None)
    return hasattr(module, "routed_experts") or (isinstance(old, type) and isinstance(module, old))


@contextlib.contextmanager
def folder_of(record: Any, values: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the config.json of what `as_published` gives."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(published.written(record, values)))
        yield Path(folder)


def as_published(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The record of a config, and the config.json of a checkpoint. Raises Absent where vLLM has no such class."""
    record = published.record_of(config)
    if record is None:
        raise Unsupported(f"vLLM: no family is known of model type {config.get('model_type')!r}")
    config = published.leveled(record, config)
    flat = published.is_flat(record, config)
    name = registry.architecture(record, flat)
    if name is None:
        raise Absent(registry.lacking(record, flat))
    values = published.config(record, name, copy.deepcopy(config))
    if not values.get("model_type"):
        raise Absent(f"vLLM serves checkpoints, and no config.json is a {name}'s: it has no model type")
    for level in (values, values.get("text_config")):
        if isinstance(level, dict):
            runtime._allow_global_reads(level)
    return record, {**values, "architectures": [name]}


@contextlib.contextmanager
def current(config: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, vLLM's modules are made and run with this config and default dtype, and choose their own kernels."""
    from vllm.config import set_current_vllm_config

    runtime.start()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(config), _on_device():
            yield
    finally:
        torch.set_default_dtype(before)


def _on_device() -> AbstractContextManager[Any]:
    """New tensors are on the GPU, as in vLLM's own worker; a CPU needs no word for it."""
    return contextlib.nullcontext() if device.is_cpu() else torch.device(device.kind())


def build(folder: Path, dtype: torch.dtype, runs: bool = True, where: str = "") -> Built:
    """The model of a folder's config.json, every parameter NaN. Raises Unsupported where vLLM cannot on this machine.

    runs: whether its experts will be computed; if not, no kernel need take their width. where: the device of its
    parameters, if it is not this machine's; "meta" for shapes alone.
    """
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(folder, str(dtype).removeprefix("torch."))
    place = torch.device(where or device.kind())
    # Its backend for transformers' models switches latent attention off in the environment, for those after it, too.
    with patch.dict(os.environ), (current if runs else runtime.building)(config, dtype), place, _beside_experts():
        try:
            model = initialize_model(config)
        except Exception as error:
            kind = Absent if registry.refuses(error) else Unsupported
            raise kind(f"vLLM does not build this model here: {type(error).__name__}: {said(error)}") from error
    servers.clear(model)
    built = Built(model.eval(), config)
    if registry.is_backend(type(model)) and next(built.moe_layers(), None) is None:
        of = config.model_config.architectures[0]
        raise Absent(f"vLLM's {type(model).__name__} leaves the experts of {of} to transformers")
    return built


def engine_config(folder: Path, dtype: str) -> Any:
    """vLLM's real VllmConfig, of the language model alone. Raises Unsupported with vLLM's words where it makes none."""
    from vllm.engine.arg_utils import EngineArgs

    offered = {
        "model": str(folder), "skip_tokenizer_init": True, "enforce_eager": True, "dtype": dtype,
        "max_model_len": MAX_LENGTH, "max_num_seqs": 4, "max_num_batched_tokens": runtime.MAX_TOKENS,
        "enable_prefix_caching": False, "language_model_only": True, **device.backend(),
    }  # fmt: skip
    names = {item.name for item in dataclasses.fields(EngineArgs)}
    if not device.backend().keys() <= names:
        raise Unsupported("EngineArgs of this release has no argument moe_backend")
    with runtime._inspected_here() as reasons, absent.imports():
        try:
            found = EngineArgs(**{k: v for k, v in offered.items() if k in names}).create_engine_config()
            _give_back_model_types(found.model_config)
            return found
        except Exception as error:
            raise Unsupported(f"vLLM makes no config of this: {'; '.join(reasons) or said(error)}") from error


def _give_back_model_types(model_config: Any) -> None:
    """vLLM reads configs of deepseek_v32 with transformers' class of deepseek_v3, and calls that class so for good."""
    from transformers.models.auto import configuration_auto

    names: Mapping[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
    for config in (model_config.hf_config, model_config.hf_text_config):
        cls = type(config)
        own = [model_type for model_type, name in names.items() if name == cls.__name__]
        if own and cls.model_type not in own:
            config.model_type = cls.model_type
            cls.model_type = own[0]


@contextlib.contextmanager
def _beside_experts() -> Iterator[None]:
    """What models have beside experts, and this machine lacks, stands in no one's way: nothing is put through it.

    What `absent` lists, and sparse attention, in whose place dense attention is made.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    real = current_platform.get_attn_backend_cls

    def plain(value: Any) -> Any:
        return value._replace(use_sparse=False) if getattr(value, "use_sparse", False) else value

    def dense(*args: Any, **kwargs: Any) -> Any:
        return real(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    with (
        absent.imports(),
        contextlib.ExitStack() as beside,
        patch.object(type(current_platform), "get_attn_backend_cls", staticmethod(dense)),
        patch.multiple(torch.cuda, Event=absent.Nothing, Stream=absent.Nothing),  # as its own worker for CPUs does
    ):
        if hasattr(current_platform, "get_supported_vit_attn_backends"):  # models of images ask for that of a GPU
            every = classmethod(lambda cls: list(AttentionBackendEnum))
            beside.enter_context(patch.object(type(current_platform), "get_supported_vit_attn_backends", every))
        for (path, name), stand_in in absent.BESIDE.items():
            if (module := sys.modules.get(path)) is not None:
                beside.enter_context(patch.object(module, name, stand_in))
        yield
