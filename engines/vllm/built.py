"""vLLM's expert layer with an expert kernel of its own inside: built by its factory, filled, made ready, run.

kernel: "native", what vLLM selects on this device; "triton", its Triton experts, interpreted on a CPU;
"batched_triton", those that take rows sorted by expert, as on an XPU ("fused_experts" is no layer:
engines/vllm/experts.py). Where vLLM refuses a layer, its own words are the reason.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import MLPSpec
from moe_conformance.engines.vllm import device, interpreted, runtime
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import Absent, Unsupported

Kernel = Literal["native", "triton", "batched_triton", "fused_experts"]

_PREFIXES = (f"model.layers.0.experts_{i}" for i in itertools.count())
# Columns that vLLM's compiled CPU kernel takes; its runner pads x to the layer's width, whatever x has.
_CPU_MULTIPLE = 32


def factory() -> Any:
    """What builds the layer, newest name first: FusedMoEFactory, SharedFusedMoE, FusedMoE."""
    from vllm.model_executor.layers import fused_moe

    names = ("FusedMoEFactory", "SharedFusedMoE", "FusedMoE")
    return next(found for name in names if (found := getattr(fused_moe, name, None)) is not None)


@dataclass(frozen=True)
class Layer:
    """What to build. width: the columns of x at the experts. tensors: the experts', canonical, of those that are here.

    padded_hidden, padded_intermediate: widths of the kernel, or None. arguments: further ones of the factory's.
    expert_map: [E] local ids, or None.
    tensor_parallel: rank and size; where it is given, tensors are of all experts at their full width, copies [P] says
    of which of them each physical expert is one, and vLLM's own loader cuts out what the rank holds.
    tokens: the most that come at once; kernels that take rows sorted by expert have room for so many of each.
    """

    mlp: MLPSpec
    width: int
    top_k: int
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    padded_hidden: int | None = None
    padded_intermediate: int | None = None
    expert_map: Tensor | None = None
    copies: Tensor | None = None
    tensor_parallel: tuple[int, int] | None = None
    tokens: int = runtime.MAX_TOKENS

    @property
    def experts(self) -> int:
        """Those that are here."""
        if self.tensor_parallel is None or self.expert_map is None:
            return len(self.tensors["experts.w2"])
        return int((self.expert_map >= 0).sum())


def words(mlp: MLPSpec) -> dict[str, Any]:
    """The arguments by which vLLM's models ask for such an expert. Raises Absent where there are none."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    known = {item.value for item in MoEActivation}
    found: dict[str, Any] = {}
    plain = MLPSpec(mlp.width, mlp.activation, gated=mlp.gated, dtype=mlp.dtype, bias=mlp.bias, weight_on=mlp.weight_on)
    clamped = MLPSpec(
        mlp.width, clamp="before", limit=mlp.limit, alpha=mlp.alpha, up_offset=mlp.up_offset, dtype=mlp.dtype,
        bias=mlp.bias, weight_on=mlp.weight_on,
    )  # fmt: skip
    after = MLPSpec(mlp.width, clamp="after", limit=7.0, dtype=mlp.dtype, bias=mlp.bias, weight_on=mlp.weight_on)
    if mlp.weight_on == "w2_input":
        raise Absent("experts: vLLM's weights multiply an expert's input or output, not what enters w2")
    if mlp == plain:
        found["activation"] = mlp.activation if mlp.gated else f"{mlp.activation}_no_mul"
        # The first releases know only "gelu", which is what their Gemma 4 asks for.
        if found["activation"] == "gelu_tanh" not in known:
            found["activation"] = "gelu"
    elif mlp == clamped and (mlp.alpha, mlp.up_offset) == (1.0, 0.0):
        found |= {"activation": "silu", "swiglu_limit": mlp.limit}
    elif mlp == clamped and (mlp.alpha, mlp.up_offset, mlp.limit) == (1.702, 1.0, 7.0):
        found["activation"] = "swigluoai"
    elif mlp == clamped:
        found |= {
            "activation": "swigluoai_uninterleave",
            "swiglu_limit": mlp.limit,
            "swiglu_alpha": mlp.alpha,
            "swiglu_beta": mlp.up_offset,
        }
    elif mlp == after:
        found["activation"] = "swiglustep"
    else:
        raise Absent(f"experts: vLLM has no activation for {mlp}")
    if found["activation"] not in known:
        raise Unsupported(f"experts: got activation {found['activation']!r}, want one of {', '.join(sorted(known))}")
    if mlp.bias:
        found["has_bias"] = True
    if mlp.weight_on == "input":
        found["apply_router_weight_on_input"] = True
    return found


@functools.cache
def _cached_config(dtype: str) -> Any:
    with runtime.gemma4_config({}, dtype) as config:
        return config


def vllm_config(dtype: torch.dtype) -> Any:
    """One config a dtype; the layers of earlier calls are forgotten, so that their memory goes too."""
    config = _cached_config(str(dtype).removeprefix("torch."))
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()
    return config


class Built:
    """A layer that has been built, and runs."""

    def __init__(self, layer: Layer, kernel: Kernel) -> None:
        runtime.start()
        if kernel != "native":
            interpreted.require(layer.dtype)
        self.layer, self.kernel = layer, kernel
        self._config = vllm_config(layer.dtype)
        with self.inside():
            self.module = _construct(layer, kernel)
            self.experts = getattr(self.module, "routed_experts", self.module)
            if layer.expert_map is not None:
                self._set_map(layer.expert_map)
            if layer.tensor_parallel is None:
                self._fill()
            else:
                self._load()
            with refusals():
                self._method().process_weights_after_loading(self.experts)

    @property
    def name(self) -> str:
        """The class of the kernel, and what stands in beside it."""
        method = self._method()
        kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None) or getattr(
            method, "cpu_fused_moe", method
        )
        name = type(kernel).__name__
        if self.kernel == "batched_triton":
            return f"{name}, interpreted"
        return interpreted.said(name) if self.kernel == "triton" else name

    def run(self, x: Tensor, logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """The layer's output. A real step's activations are the layer's to overwrite; a caller's are not."""
        from vllm.forward_context import create_forward_context, override_forward_context

        given = {"hidden_states": x.clone(), "router_logits": logits.clone()}
        if token_ids is not None:
            given["input_ids"] = token_ids
        with self.inside(), override_forward_context(create_forward_context(None, self._config)), refusals():
            out = self.module(**given)
        if not isinstance(out, tuple):
            return out
        return out[0] + out[1] if out[0] is not None else out[1]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, vLLM is set up for this layer."""
        with contextlib.ExitStack() as stack:
            room: Any = patch.object(self._config.scheduler_config, "max_num_batched_tokens", self.layer.tokens)
            stack.enter_context(room)
            stack.enter_context(runtime.building(self._config, self.layer.dtype, any_width=False))
            stack.enter_context(experts_of(self.kernel))
            if self.kernel != "native":
                stack.enter_context(scratch())
                stack.enter_context(interpreted.activations_of(self.layer.mlp.width))
            yield

    def _method(self) -> Any:
        owners = (self.experts, getattr(self.module, "runner", self.module))
        names = ("quant_method", "_quant_method")
        return next(found for owner in owners for name in names if (found := getattr(owner, name, None)) is not None)

    def _fill(self) -> None:
        """Write the tensors into vLLM's own parameters, [E, 2F, D] with gate above up, or interleaved for gpt-oss.

        What lies outside is 0, and NaN in what becomes a padded column of the output, which must not be seen again.
        """
        mlp, tensors = self.layer.mlp, self.layer.tensors
        parameters = {name: p.data for name, p in self.experts.named_parameters(recurse=False)}
        for parameter in parameters.values():
            parameter.zero_()
        width, padded = self.layer.width, parameters["w2_weight"].shape[1]
        if self.layer.padded_hidden is not None and padded > width:
            parameters["w2_weight"][:, width:] = math.nan
        parameters["w2_weight"][:, :width, : mlp.width] = tensors["experts.w2"]
        first = "13" if mlp.gated else "1"
        _write_first(parameters["w13_weight"], tensors[f"experts.w{first}"], mlp, self._interleaved())
        if mlp.bias:
            parameters["w2_bias"][:, :width] = tensors["experts.b2"]
            _write_first(parameters["w13_bias"], tensors[f"experts.b{first}"], mlp, self._interleaved())

    def _load(self) -> None:
        """Offer vLLM's loader every expert; it keeps what this rank holds, in its place."""
        mlp, tensors = self.layer.mlp, self.layer.tensors
        parameters = dict(self.experts.named_parameters(recurse=False))
        for parameter in parameters.values():
            parameter.data.zero_()
        first, held = "13" if mlp.gated else "1", self.layer.expert_map
        copies = range(len(tensors["experts.w2"])) if self.layer.copies is None else self.layer.copies.tolist()
        for expert, copied in enumerate(copies):
            for letter, end in (("w", "weight"), *((("b", "bias"),) if mlp.bias else ())):
                value = tensors[f"experts.{letter}{first}"][copied]
                parts = [("w13", "w1", value[: mlp.width]), ("w2", "w2", tensors[f"experts.{letter}2"][copied])]
                if mlp.gated:
                    parts.append(("w13", "w3", value[mlp.width :]))
                for name, part, loaded in parts:
                    parameter = parameters[f"{name}_{end}"]
                    taken = parameter.weight_loader(
                        parameter, loaded, f"experts.{name}_{end}", shard_id=part, expert_id=expert, return_success=True
                    )
                    if not taken and end == "bias" and (held is None or held[expert] >= 0):
                        raise Unsupported("vLLM: the loader of this release's experts takes no bias")

    def _interleaved(self) -> bool:
        activation = self.experts.activation
        return str(getattr(activation, "value", activation)) == "swigluoai"

    def _set_map(self, expert_map: Tensor) -> None:
        """Put the map where the layer keeps its own, as under expert parallelism."""
        self.experts._expert_map = expert_map.int()
        if hasattr(self.experts, "expert_map_manager"):
            self.experts.expert_map_manager._expert_map = expert_map.int()
        self.experts.global_num_experts = len(expert_map)
        router: Any = getattr(self.module, "router", None)
        if hasattr(router, "num_logical_experts"):
            router.num_logical_experts = len(expert_map)


def _write_first(target: Tensor, source: Tensor, mlp: MLPSpec, interleaved: bool) -> None:
    columns = (slice(None),) if source.dim() == 2 else (slice(None), slice(source.shape[-1]))
    if not mlp.gated:
        target[:, : mlp.width][(slice(None), *columns)] = source
        return
    half = target.shape[1] // 2
    gate, up = source[:, : mlp.width], source[:, mlp.width :]
    gates, ups = (target[:, 0::2], target[:, 1::2]) if interleaved else (target[:, :half], target[:, half:])
    gates[:, : mlp.width][(slice(None), *columns)] = gate
    ups[:, : mlp.width][(slice(None), *columns)] = up


def _construct(layer: Layer, kernel: Kernel) -> Any:
    build, offered = factory(), arguments_of(layer, kernel)
    with refusals():
        return build(**offered)


def arguments_of(layer: Layer, kernel: Kernel) -> dict[str, Any]:
    """What the factory is given. Raises Unsupported for what this release's has no argument for."""
    asked = words(layer.mlp)
    hidden, intermediate = layer.padded_hidden or layer.width, layer.padded_intermediate or layer.mlp.width
    if kernel == "native" and hasattr(torch.ops._C, "prepack_moe_weight"):
        hidden = -(-hidden // _CPU_MULTIPLE) * _CPU_MULTIPLE
        # It pads the width of experts itself, but for those of gpt-oss.
        if asked["activation"] == "swigluoai" and layer.tensor_parallel is None:
            intermediate = -(-intermediate // _CPU_MULTIPLE) * _CPU_MULTIPLE
    offered: dict[str, Any] = {
        "num_experts": layer.experts,
        "top_k": layer.top_k,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "params_dtype": layer.dtype,
        "prefix": next(_PREFIXES),
        **asked,
        **layer.arguments,
    }
    build = factory()
    wanted = inspect.signature(build).parameters
    if layer.tensor_parallel is not None:
        offered["tp_size"] = layer.tensor_parallel[1]
    if not layer.mlp.gated:
        if "ckpt_names" in wanted:
            offered["ckpt_names"] = ("w1", "w2", None)
        elif "is_act_and_mul" in wanted:
            offered |= {"is_act_and_mul": False, "activation": offered["activation"]}
    absent = [name for name in offered if name not in wanted]
    if absent:
        raise Unsupported(f"{build.__name__} of this release has no argument {', '.join(absent)}")
    return offered


@contextlib.contextmanager
def experts_of(kernel: Kernel) -> Iterator[None]:
    """Inside, vLLM selects an expert kernel of this kind, by its own rules of what the kernel supports."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    select: Any = getattr(method, "select_unquantized_moe_backend", None)
    if select is None or (kernel == "native" and not device.is_cpu()):
        yield
        return
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    if kernel == "batched_triton":

        def asked_for(*args: Any, **kwargs: Any) -> Any:
            try:
                return select(*args, **kwargs)
            except ValueError as error:
                raise Unsupported(f"vLLM: {error}") from error

        with interpreted.batched(), patch.object(method, "select_unquantized_moe_backend", asked_for):
            yield
        return
    backend = getattr(unquantized.UnquantizedMoeBackend, "CPU" if kernel == "native" else kernel.upper())
    try:
        found = unquantized.backend_to_kernel_cls(backend)
    except (AttributeError, ValueError):  # a release without classes of kernels, or without one for a CPU
        found = []
    classes = found if isinstance(found, (list, tuple)) else [found]

    def selected(moe_config: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel == "triton":
            if not classes:
                raise Unsupported("vLLM: this release chooses Triton experts without a class of kernels")
            with interpreted.as_gpu(sys.modules[classes[0].__module__]):
                return backend, _supported(classes[0], moe_config)
        try:
            return select(moe_config, *args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            # The last class is the portable one; where it gives no reason, the error is all there is.
            if classes:
                _supported(classes[-1], moe_config)
            raise Unsupported(f"vLLM: {error}") from error

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(method, "select_unquantized_moe_backend", selected))
        if kernel == "triton":
            # The config of a layer asks what the platform is, before any kernel is chosen.
            stack.enter_context(interpreted.as_gpu(import_module("vllm.model_executor.layers.fused_moe.config")))
        yield


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Inside, kernels of releases that ask a worker's manager for scratch memory have fresh memory."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    def get_simultaneous(*asked: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in asked]

    manager = SimpleNamespace(get_simultaneous=get_simultaneous)
    with patch.object(modular_kernel, "current_workspace_manager", lambda: manager, create=True):
        yield


def _supported(experts: Any, moe_config: Any) -> Any:
    """The class, where vLLM says that it supports this layer. Raises Unsupported with its reason where not."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    asked = getattr(experts, "is_supported_config", None)
    if asked is not None:
        standard = modular_kernel.FusedMoEActivationFormat.Standard
        fits, reason = asked(experts, moe_config, None, None, standard)
        if not fits:
            raise Unsupported(f"vLLM's {experts.__name__}: {reason}")
    return experts
