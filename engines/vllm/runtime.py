"""vLLM in this process: configs made from dicts, one process group, and patches that are always undone.

Nothing here asks for a version number. Where releases differ, an attribute or a signature is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import runpy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moe_conformance.engines import published
from moe_conformance.engines.vllm import absent, device, interpreted
from moe_conformance.errors import Unsupported

# Before anything imports vllm.
interpreted.install()

# Tokens of one step; the capturers' and layers' buffers are sized by it.
MAX_TOKENS = 128


def release() -> str:
    """The version in vLLM's own file. An environment's metadata may be of another release (tools/releases.py)."""
    spec = find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / "_version.py"
        if file.exists():
            return str(runpy.run_path(str(file)).get("__version__", "unknown"))
    return "unknown"


@functools.cache
def start() -> None:
    """Initialise vLLM's distributed state for one rank, once a process. Raises Unavailable on an unknown device."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if device.is_cpu():
        _define_missing_ops()
        # Linux kills what uses AMX unasked. vLLM's experts do not ask: in a server other products have done so before
        # (findings/vllm_cpu_bfloat16.py).
        torch.cpu._init_amx()
    backend = "gloo" if device.is_cpu() else "nccl"
    with tempfile.TemporaryDirectory() as folder, gemma4_config({}) as config, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
        initialize_model_parallel(1, 1)


def _define_missing_ops() -> None:
    """Define the compiled activations that this build lacks: vLLM's own torch of each computes them.

    Its constructors look them up, and its Triton experts call them.
    """
    import vllm._custom_ops  # noqa: F401  a library that loads defines them itself, and must come first

    for name, (signature, function) in interpreted.ACTIVATIONS.items():
        if not hasattr(torch.ops._C, name):
            # Kept for the life of the process: models that were built hold a reference to the op.
            library = torch.library.Library("_C", "FRAGMENT")
            library.define(f"{name}({signature}) -> ()")
            library.impl(name, function, "CPU")
            _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []


@contextlib.contextmanager
def config_folder(config: Any) -> Iterator[Path]:
    """A folder with the config.json of a transformers config or its dict. Raises Unsupported for an unknown model."""
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    known = _known_architectures()
    named = values.get("architectures") or []
    candidates = [*named, *published.architectures_of(str(values.get("model_type", "")))]
    architecture = next((name for name in candidates if name in known), None)
    if architecture is None:
        raise Unsupported(
            f"vLLM knows none of the architectures {candidates} of model type {values.get('model_type')!r}"
        )
    values["architectures"] = [architecture]
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            _allow_global_reads(part)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        yield Path(folder)


def _allow_global_reads(values: dict[str, Any]) -> None:
    """Let releases older than transformers' per-layer configs read, say, head_dim of a config whose layers differ."""
    from transformers import PretrainedConfig

    name = "allow_global_per_layer_attribute_access"
    if hasattr(PretrainedConfig, name):
        values.setdefault(name, True)


@functools.cache
def _known_architectures() -> frozenset[str]:
    from vllm.model_executor.models import ModelRegistry

    return frozenset(ModelRegistry.get_supported_archs())


@contextlib.contextmanager
def _inspected_here() -> Iterator[list[str]]:
    """vLLM inspects each model class in a fresh process, 10 s each; here it is done in this one.

    Gives the reasons why a class could not be imported: vLLM's own error does not name them.
    """
    from vllm.model_executor.models import registry

    reasons: list[str] = []

    def call_here(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ImportError as error:
            reasons.append(str(error))
            raise

    if not hasattr(registry, "_run_in_subprocess"):
        yield reasons
        return
    with patch.object(registry, "_run_in_subprocess", call_here):
        yield reasons


def model_config(folder: Path) -> Any:
    """vLLM's real ModelConfig of a folder. Raises Unsupported, with the reason, where vLLM cannot make one."""
    from vllm.config import ModelConfig

    with _inspected_here() as reasons, absent.imports():
        try:
            return ModelConfig(
                model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True
            )
        except Exception as error:
            why = "; ".join(reasons) or f"{type(error).__name__}: {error}"
            raise Unsupported(f"vLLM makes no ModelConfig of this config: {why}") from error


def engine_config(folder: Path, dtype: str = "float32") -> Any:
    """vLLM's real VllmConfig of a folder; a new one for each model, for layers register their names in it."""
    from vllm.engine.arg_utils import EngineArgs

    asked: dict[str, Any] = {**device.backend()}
    if not asked.keys() <= {item.name for item in dataclasses.fields(EngineArgs)}:
        raise Unsupported("EngineArgs of this release has no argument moe_backend")
    with _inspected_here():
        return EngineArgs(
            model=str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype=dtype, max_model_len=MAX_TOKENS,
            max_num_seqs=4, max_num_batched_tokens=MAX_TOKENS, **asked,
        ).create_engine_config()  # fmt: skip


@contextlib.contextmanager
def gemma4_config(values: Mapping[str, Any], dtype: str = "float32") -> Iterator[Any]:
    """VllmConfig of a one-layer Gemma 4 with these values in place of tiny ones."""
    text = {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 1,
        "layer_types": ["full_attention"], "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32,
        "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "attention_k_eq_v": False,
        "max_position_embeddings": 256, "sliding_window": 64,
    }  # fmt: skip
    with config_folder({**text, **values}) as folder:
        yield engine_config(folder, dtype)


@contextlib.contextmanager
def building(config: Any, dtype: torch.dtype, any_width: bool = True) -> Iterator[None]:
    """Inside, vLLM's modules can be constructed: current config, default dtype, and experts of any width.

    any_width: the CPU's expert kernels take multiples of 32 only; where none of them runs, the choice of one must not
    fail.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    start()
    select: Any = getattr(method, "select_unquantized_moe_backend", None)

    def select_any(*args: Any, **kwargs: Any) -> Any:
        try:
            return select(*args, **kwargs)
        except (NotImplementedError, ValueError):
            from vllm.model_executor.layers.fused_moe.oracle import unquantized

            backend = unquantized.UnquantizedMoeBackend.CPU
            kernels = unquantized.backend_to_kernel_cls(backend)
            return backend, kernels[0] if isinstance(kernels, (list, tuple)) else kernels

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(config))
            if not device.is_cpu():
                stack.enter_context(torch.device(device.kind()))
            if select is not None and any_width:
                stack.enter_context(patch.object(method, "select_unquantized_moe_backend", select_any))
            yield
    finally:
        torch.set_default_dtype(before)
