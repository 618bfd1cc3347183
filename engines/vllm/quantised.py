"""Checkpoints of quantised weights: vLLM's own methods make the parameters, its loader fills them, and what they say.

What is read are parameters as they were loaded, before they are laid out for a kernel: codes times scales. Most methods
have no kernel for a CPU, and none is asked: the choice of one must not fail.
"""

from __future__ import annotations

import contextlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import Unsupported

_LAYERS = "vllm.model_executor.layers"
# By quant_method, the modules with its methods of experts.
_METHODS = {
    "fp8": "fp8",
    "modelopt": "modelopt",
    "mxfp4": "mxfp4",
    "compressed-tensors": "compressed_tensors.compressed_tensors_moe",
}
# Numbers of a code of four bits, e2m1 (OCP Microscaling Formats 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def formats() -> frozenset[str]:
    """Formats of codes whose parameters are read here; none of a release whose layers do not say their own widths."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    if not {"hidden_dim_unpadded", "intermediate_size_per_partition_unpadded"} <= {
        *FusedMoEConfig.__dataclass_fields__
    }:
        return frozenset()
    return frozenset(f"quantised:{name}" for name in ("fp8_e4m3", "int8", "int4", "mxfp4", "nvfp4", "nf4"))


@contextlib.contextmanager
def any_kernel(method: str) -> Iterator[None]:
    """Inside, quantised experts are made though no kernel here computes them; linear layers are not quantised.

    Published checkpoints list the linear layers that are not; a folder of MoE layers alone has none that is.
    """
    if method not in _METHODS:
        yield  # vLLM has its own words for it
        return
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    # Imported first, so that none of them keeps what is put in the place of a choice.
    names = [name for name in QUANTIZATION_METHODS if name == method or name.startswith(f"{method}_")]
    classes: list[Any] = [get_quantization_config(name) for name in names]
    _import_all(import_module(f"{_LAYERS}.quantization.{_METHODS[method]}"))

    def of_experts(get: Any) -> Any:
        def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else get(self, layer, prefix)

        return get_quant_method

    with contextlib.ExitStack() as stack:
        for owner in classes:
            stack.enter_context(patch.object(owner, "get_quant_method", of_experts(owner.get_quant_method)))
        for module in [found for name, found in sys.modules.items() if name.startswith(f"{_LAYERS}.quantization.")]:
            for name, select in list(vars(module).items()):
                if name.startswith("select_") and name.endswith("_moe_backend"):
                    stack.enter_context(patch.object(module, name, _undecided(select)))
        yield


def _import_all(module: ModuleType) -> None:
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        with contextlib.suppress(ImportError):
            import_module(f"{module.__name__}.{found.name}")


def _undecided(select: Any) -> Any:
    """vLLM's choice of a kernel; where it has none for this machine, a backend whose parameters lie as published."""
    home = sys.modules[select.__module__]

    def selected(*args: Any, **kwargs: Any) -> Any:
        try:
            return select(*args, **kwargs)
        except (NotImplementedError, ValueError):
            backends = next(
                found
                for name, found in vars(home).items()
                if name.endswith("Backend") and getattr(found, "__module__", "") == home.__name__
            )
            names = [name for name in ("TRITON", "EMULATION") if hasattr(backends, name)]
            return (getattr(backends, names[0]) if names else next(iter(backends))), None

    return selected


def rows_of(experts: Any) -> dict[str, int]:
    """The rows of each bias, without those that a kernel would have beyond."""
    config = experts.moe_config
    return {"b13": 2 * config.intermediate_size_per_partition_unpadded, "b2": config.hidden_dim_unpadded}


def matrices(experts: Any, tile: tuple[int, int] | None) -> dict[str, Tensor]:
    """The matrices of a loaded expert layer in float64: w13 [E, 2F, H] with gate above up, and w2 [E, H, F].

    tile: rows and columns of one that has a scale.
    """
    if not experts.moe_config.is_act_and_mul:
        raise Unsupported("load: quantised experts without a gate are not read here")
    rows_of_each = rows_of(experts)
    hidden, width = rows_of_each["b2"], rows_of_each["b13"] // 2
    # Releases without a runner of their own (to 0.27) keep the parameters in the layer itself.
    owner = getattr(experts, "routed_experts", experts)
    held = {name: value.detach() for name, value in owner.named_parameters(recurse=False)}
    found = {}
    for name, (rows, columns) in {"w13": (2 * width, hidden), "w2": (hidden, width)}.items():
        own = {key.removeprefix(f"{name}_"): value for key, value in held.items() if key.startswith(f"{name}_")}
        found[name] = _numbers(own, rows, columns, tile, 2 if name == "w13" else 1)
    return found


def _numbers(own: Mapping[str, Tensor], rows: int, columns: int, tile: tuple[int, int] | None, parts: int) -> Tensor:
    """Codes times scales. own: the parameters of one matrix, by what follows its name. parts: gate and up, or one."""
    codes = own.get("weight_packed", own.get("weight"))
    scale = own.get("weight_scale_inv", own.get("weight_scale"))
    if codes is not None and scale is None and codes.dtype in (torch.bfloat16, torch.float32):
        return codes[:, :rows, :columns]  # a layer that was left out
    if codes is None or scale is None:
        raise Unsupported(f"load: vLLM keeps a quantised matrix as {', '.join(sorted(own))}, which is not read here")
    if codes.dtype == torch.float8_e4m3fn:
        plain = codes.double()
        if scale.dim() < 3:  # of a matrix, one each of gate and up, or of rows
            each = scale.double().reshape(len(codes), -1, 1)
            return plain * (each if each.shape[1] == rows else each.repeat_interleave(rows // parts, 1))
        high, wide = tile or (1, columns)
        return plain * _spread(scale.double(), high, wide, rows, columns)
    if codes.dtype == torch.int32:
        size = 32 * codes.shape[-1] // columns
        if 32 % size:
            raise Unsupported(f"load: codes of {size} bits reach over the end of a word, and are not read here")
        plain = _unpacked(codes, size, -1)[..., :columns].double()
        group = columns // scale.shape[-1]
        zeros = torch.full_like(scale, 2 ** (size - 1), dtype=torch.float64)
        if "weight_zero_point" in own:
            zeros = _unpacked(own["weight_zero_point"], size, 1)[:, :rows].double()
        return (plain - _spread(zeros, 1, group, rows, columns)) * _spread(scale.double(), 1, group, rows, columns)
    if codes.dtype == torch.uint8:
        halves = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[:, :rows, :columns]
        plain = torch.tensor(_E2M1, dtype=torch.float64)[halves.long()]
        if scale.dtype == torch.uint8:
            return plain * _spread(torch.exp2(scale.double() - 127), 1, 32, rows, columns)
        whole = own.get("weight_scale_2", own.get("weight_global_scale"))
        if whole is not None:
            whole = whole.double().reshape(len(codes), -1, 1).repeat_interleave(rows // parts, 1)
            plain = plain * whole if "weight_scale_2" in own else plain / whole
        return plain * _spread(scale.double(), 1, 16, rows, columns)
    raise Unsupported(f"load: vLLM keeps codes as {codes.dtype}, which is not read here")


def _spread(scale: Tensor, high: int, wide: int, rows: int, columns: int) -> Tensor:
    """Each element's own of the scales of so many rows and columns."""
    return scale.repeat_interleave(high, 1)[:, :rows].repeat_interleave(wide, 2)[:, :, :columns]


def _unpacked(words: Tensor, size: int, dim: int) -> Tensor:
    """Codes of so many bits along a dim, the lowest bits of a word first."""
    shifts = torch.arange(0, 32, size, dtype=torch.int32)
    codes = words.movedim(dim, -1)[..., None] >> shifts & (2**size - 1)
    return codes.flatten(-2).movedim(-1, dim)
