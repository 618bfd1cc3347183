"""What each half of vLLM's routed-experts capture makes of a model's config.

The halves of the releases: RoutedExpertsCapturer on the worker, always; on the other side RoutedExpertsReader over
shared memory, a host cache, RoutedExpertsManager in the scheduler, or the auxiliary output connector.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import CaptureShape
from moe_conformance.engines.vllm import device, runtime
from moe_conformance.errors import Unsupported


def recorder() -> ModuleType:
    """The module of RoutedExpertsCapturer. Raises ImportError where vLLM has none."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    return routed_experts_capturer


def capture_shape(config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
    """Build the real half on the config and read its buffer's sizes; what vLLM raises meanwhile passes through."""
    runtime.start()
    rec = recorder()
    with runtime.config_folder(config) as folder, contextlib.ExitStack() as stack:
        experts = stack.enter_context(_experts_it_asks_for(rec))
        vllm_config = vllm_config_of(runtime.model_config(folder))
        if side == "worker":
            layers, top_k = stack.enter_context(capturer(vllm_config, 1)).buffer().shape[1:]
        else:
            layers, top_k = stack.enter_context(_reader(rec, vllm_config))
        return CaptureShape(int(layers), int(top_k), experts[-1] if experts else None)


def vllm_config_of(model_config: Any, dp_rank: int = 0, dp_size: int = 1, tp_size: int = 1) -> Any:
    """The part of a VllmConfig that the capturers read, around a real ModelConfig."""
    parallel = SimpleNamespace(data_parallel_rank=dp_rank, data_parallel_size=dp_size, tensor_parallel_size=tp_size)
    return SimpleNamespace(
        model_config=model_config, parallel_config=parallel, instance_id=f"moe-conformance-{uuid.uuid4().hex}"
    )


@contextlib.contextmanager
def _experts_it_asks_for(rec: ModuleType) -> Iterator[list[int]]:
    """Listens to the functions that resolve the number of experts; the answers, last one last."""
    heard: list[int] = []

    def listening(name: str, pick: Callable[[Any], int]) -> Any:
        real = getattr(rec, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = real(*args, **kwargs)
            heard.append(pick(answer))
            return answer

        return patch.object(rec, name, call)

    with contextlib.ExitStack() as stack:
        if hasattr(rec, "get_num_experts"):
            stack.enter_context(listening("get_num_experts", int))
        if hasattr(rec, "_get_routed_experts_shape"):
            stack.enter_context(listening("_get_routed_experts_shape", lambda shape: int(shape[1])))
        yield heard


class Capturer:
    """vLLM's capturer and its buffer, whichever the release names and orders them."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def buffer(self) -> Tensor:
        """[tokens, L, K], a view of the capturer's own memory."""
        for name in ("device_buffer", "_device_buffer"):
            if isinstance(getattr(self.real, name, None), Tensor):
                return getattr(self.real, name)
        return self.real.get_device_cache().buffer.transpose(0, 1)


@contextlib.contextmanager
def capturer(vllm_config: Any, max_tokens: int, tp_rank: int = 0) -> Iterator[Capturer]:
    """The worker's half, as the release builds it."""
    rec = recorder()
    cls = rec.RoutedExpertsCapturer
    if hasattr(cls, "init_buffer"):
        with patch.object(rec, "get_tensor_model_parallel_rank", lambda: tp_rank), _without_files(rec, vllm_config):
            real = cls()
            try:
                real.init_buffer(max_tokens, max_tokens, vllm_config)
                yield Capturer(real)
            finally:
                real.cleanup()
        return
    offered: dict[str, Any] = {
        "enable": True, "model_config": vllm_config.model_config, "num_fused_shared_experts": 0,
        "max_num_batched_tokens": max_tokens, "max_model_len": max_tokens, "device": device.kind(),
        "skip_host_cache": True, "vllm_config": vllm_config,
    }  # fmt: skip
    build = getattr(cls, "create", cls)
    wanted = inspect.signature(build).parameters
    if "kv_cache_config" in wanted:
        offered["kv_cache_config"] = kv_cache_config()
    yield Capturer(build(**{name: value for name, value in offered.items() if name in wanted}))


def kv_cache_config(blocks: int = 1, block_size: int = 16) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


@contextlib.contextmanager
def _without_files(rec: ModuleType, vllm_config: Any) -> Iterator[str]:
    """The lock file of a shared buffer, removed at the end."""
    end = f"{vllm_config.instance_id}_{vllm_config.parallel_config.data_parallel_rank}"
    lock = f"{rec._LOCK_FILE_PREFIX}_{end}.lock"
    try:
        yield lock
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(lock)


@contextlib.contextmanager
def _reader(rec: ModuleType, vllm_config: Any) -> Iterator[tuple[int, int]]:
    """The other half; gives its (layers, top-k)."""
    if hasattr(rec, "RoutedExpertsReader"):
        with _shared_buffer(rec, vllm_config):
            reader = rec.RoutedExpertsReader()
            try:
                reader.attach_buffer(1, vllm_config)
                yield reader._host_buffer_view.shape[1:]
            finally:
                reader._host_buffer_view = None
                reader.cleanup()
    elif hasattr(rec, "RoutedExpertsManager"):
        yield rec.RoutedExpertsManager(vllm_config, kv_cache_config()).routed_experts_by_slot.shape[1:]
    elif hasattr(rec, "create_shared_host_cache"):
        with patch.object(rec, "_shared_host_cache", None):
            cache = rec.create_shared_host_cache(vllm_config.model_config, 1)
            yield cache.get_or_grow_buffer("request", 0).shape[1:]
    else:
        yield _connector_shape(vllm_config)


@contextlib.contextmanager
def _shared_buffer(rec: ModuleType, vllm_config: Any) -> Iterator[None]:
    """Shared memory under the worker's name, large enough for a row of any model: the reader is judged alone."""
    name = f"{rec._BUFFER_PREFIX}_{vllm_config.instance_id}_{vllm_config.parallel_config.data_parallel_rank}"
    with _without_files(rec, vllm_config) as lock:
        memory = shared_memory.SharedMemory(name=name, create=True, size=1 << 20)
        try:
            with open(lock, "wb"):
                pass
            yield
        finally:
            memory.close()
            memory.unlink()


def _connector_shape(vllm_config: Any) -> tuple[int, int]:
    """Sizes of the auxiliary output connector's row buffer. It binds a model's routers; here it is given none."""
    try:
        from vllm.distributed.aux_output_connector import worker
    except ImportError as error:
        raise Unsupported("capture_shape: this release has no reading half that is known") from error
    with runtime.gemma4_config({}) as config, patch.object(worker, "bind_routed_experts_capturer", lambda *args: None):
        config = copy.copy(config)
        config.model_config = vllm_config.model_config
        connector = worker.AuxOutputWorkerConnector(
            vllm_config=config, model=torch.nn.Module(), kv_cache_config=kv_cache_config()
        )
        try:
            return connector._buffer._rows.shape[2:]
        finally:
            connector.close()
