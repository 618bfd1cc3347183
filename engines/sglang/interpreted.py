"""What SGLang dispatches to on a GPU, as far as it is Triton and torch, on a CPU: told by patches that are undone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from moe_conformance.engines.sglang import device
from moe_conformance.errors import Unsupported

_MOE = "sglang.srt.layers.moe"
_KERNELS = "sglang.kernels.ops.moe"
_ALIGN = f"{_MOE}.moe_runner.triton_utils.moe_align_block_size"
_FUSED = f"{_MOE}.moe_runner.triton_utils.fused_moe"


def require(dtype: torch.dtype | None = None) -> None:
    """Raise Unsupported where kernels are interpreted and this dtype cannot be."""
    if device.is_cpu() and dtype is torch.bfloat16:
        raise Unsupported("SGLang's Triton kernels: Triton's interpreter computes with the raw bits of bfloat16")


def said(name: str) -> str:
    """How a result names a Triton kernel that ran here."""
    return f"{name}, interpreted" if device.is_cpu() else name


@contextlib.contextmanager
def as_gpu(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, routers and experts are those of an NVIDIA GPU. dtype: of x at the experts."""
    if not device.is_cpu():
        yield
        return
    require(dtype)
    topk = import_module(f"{_MOE}.topk")
    unquant = import_module("sglang.srt.layers.quantization.unquant")
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, create=True))

        put(topk, "_is_cuda", True)
        put(topk, "_is_cpu", False)
        if not hasattr(topk, "fused_topk_deepseek"):
            put(topk, "fused_topk_deepseek", None)  # FlashInfer's, as where that is not installed
        put(topk.TopK, "forward_native", topk.TopK.forward_cuda)
        method = unquant.UnquantizedFusedMoEMethod
        put(method, "forward_native", method.forward_cuda)
        stack.enter_context(aligning())
        fused = import_module(_FUSED)
        for name in ("inplace_fused_experts", "outplace_fused_experts"):
            operator = getattr(fused, name)  # registered for CUDA alone, around a function of torch and Triton
            put(fused, name, getattr(operator, "__wrapped__", operator))
        if hasattr(fused, "moe_combine_topk"):
            put(fused, "moe_combine_topk", _combining(fused))
        elif dtype is not None:
            raise Unsupported("SGLang's Triton kernels: this release sums experts by operators of a GPU alone")
        # No machine's tuned sizes of blocks are looked up, but SGLang's own default.
        put(import_module(f"{_FUSED}_triton_config"), "get_device_name", lambda: "CPU")
        if dtype is torch.float32:
            # Its kernels store what is not bfloat16 as float16, which float32 would drown in: docs/sglang.md.
            put(fused, "tl", SimpleNamespace(bfloat16=fused.tl.bfloat16, float16=fused.tl.float32))
        for name, module in list(sys.modules.items()):
            # No kernel waits for another on the device: the interpreter has no word for that.
            if name.startswith((_KERNELS, _MOE)) and "is_arch_support_pdl" in vars(module):
                put(module, "is_arch_support_pdl", lambda: False)
        yield


def _combining(fused: Any) -> Any:
    """Its sum over a token's experts by the Triton kernel that every platform has; where the last kernel has written
    the output itself, nothing, as on all GPUs."""
    real = fused.moe_combine_topk

    def combine(**arguments: Any) -> Any:
        with patch.object(fused, "_is_hip", not arguments["_use_intermediate"]):
            return real(**arguments)

    return combine


@contextlib.contextmanager
def aligning() -> Iterator[None]:
    """Inside, pairs are aligned by the one kernel of SGLang's for it that is Triton, whatever their number is."""
    if not device.is_cpu():
        yield
        return
    align, small = import_module(_ALIGN), import_module(f"{_KERNELS}.moe_align_small_numel")
    with contextlib.ExitStack() as stack:
        for name, value in {
            "_is_cuda": True,
            "SMALL_NUMEL_LIMIT": sys.maxsize,
            "_CUDA_SMALL_BATCH_MAX_BUCKETS": -1,
            "moe_align_small_numel": small.moe_align_small_numel,
        }.items():
            stack.enter_context(patch.object(align, name, value, create=True))
        stack.enter_context(patch.object(small, "is_arch_support_pdl", lambda: False))
        # It compares all pairs with all experts at once; what that may hold at most is a compiler's limit.
        stack.enter_context(patch.object(import_module("triton._utils"), "TRITON_MAX_TENSOR_NUMEL", sys.maxsize))
        yield


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Inside, parts of Triton's own library that its interpreter is slow at, or lacks, are NumPy's."""
    if not device.is_cpu():
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def of(x: Any, data: Any) -> Any:
        return tl.tensor(TensorHandle(np.asarray(data, dtype=x.handle.data.dtype), x.handle.dtype), x.type)

    def sort(x: Any, dim: Any = None, descending: Any = False) -> Any:
        data = np.sort(x.handle.data, axis=-1)
        return of(x, data[..., ::-1] if getattr(descending, "value", descending) else data)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tl, "sort", sort))
        for name in ("exp", "log1p", "sqrt"):
            function = getattr(np, name)
            stack.enter_context(patch.object(libdevice, name, lambda x, f=function: of(x, f(x.handle.data))))
        yield
