"""The MoE block of one layer: vLLM's own model of the config, filled by its own loader, run as its decoder layer does.

Real: the class and what it makes of the config, load_weights, what follows loading (prepacked weights), the gate, the
router, the expert kernel that vLLM chooses here, shared experts, the sum. Nothing of this package computes in between.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_conformance.engine import (
    BlockInputs,
    BlockOutput,
    Routing,
    Unsupported,
    called_by_engine,
    checkpoint_of,
    layer_of,
)
from moe_conformance.engines import servers
from moe_conformance.engines.decoder import Around, whole_layer
from moe_conformance.engines.vllm import device, interpreted, models, routing, runtime
from moe_conformance.engines.vllm.built import experts_of, scratch
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import CheckpointError, ConfigError

Tensors = Mapping[str, Tensor]
Platform = routing.Platform
# Whose kernels and routers are asked, in this order: the device's own, and on a CPU those of GPUs.
PLATFORMS: tuple[Platform, ...] = ("native", "gpu", "rocm")
# What is over, compute_identity_kernel leaves out; every model that has such experts is a multiple of it wide.
_IDENTITY_MULTIPLE = 256


def features() -> frozenset[str]:
    return models.model_types() | {"same_bits"}


@torch.no_grad()
def block(inputs: BlockInputs) -> tuple[BlockOutput, str]:
    """The answer, its routing as vLLM's router hands it to the expert kernel; and that kernel's name.

    What vLLM has no kernel or router for on a CPU is computed by those that it has for a GPU, as far as they are torch
    or interpreted. Raises Unsupported with the reasons of both.
    """
    runtime.start()
    config, reasons = json.dumps(dict(inputs.config)), []
    for platform in PLATFORMS if device.is_cpu() else PLATFORMS[:1]:
        try:
            return _block(inputs, Key(config, inputs.layer, inputs.x.dtype, inputs.tensors, platform))
        except Unsupported as refusal:
            reasons.append(str(refusal))
    raise Unsupported("; ".join(dict.fromkeys(reasons)))


def _block(inputs: BlockInputs, key: Key) -> tuple[BlockOutput, str]:
    from vllm.forward_context import create_forward_context, override_forward_context

    found = _CACHED.pop(key, None) or _ready(key)
    if hasattr(getattr(found.experts, "router", None), "zero_expert_type") and inputs.x.shape[-1] % _IDENTITY_MULTIPLE:
        raise Unsupported(
            f"vLLM's kernel of identity experts takes {_IDENTITY_MULTIPLE} columns at a time, got {inputs.x.shape[-1]}"
        )
    x = inputs.x.flatten(0, -2).clone()  # a real step's activations are the block's to overwrite
    ids = None if inputs.token_ids is None else inputs.token_ids.flatten()
    context = override_forward_context(create_forward_context(None, found.config))
    with found.running(), context, refusals(), Tap(found, inputs.routing) as tap:
        output = found(x, ids)
    _CACHED[key] = found  # one that broke off half-way is not run again
    if inputs.routing is not None and tap.seen is None:
        raise Unsupported(f"block: {type(found.experts).__name__} asks no router in a place where a routing can be put")
    answer = BlockOutput(output.reshape(x.shape), None if inputs.routing else tap.seen)
    ran = kernel_of(found.experts)
    return answer, f"{found.name}, {ran if key.platform == 'native' else interpreted.said(ran)}"


def kernel_of(experts: Any) -> str:
    """The class of what computes an expert layer, and its variant."""
    method = next(
        (found for name in ("_quant_method", "quant_method") if (found := getattr(experts, name, None)) is not None),
        None,
    )
    kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    for found in (kernel, getattr(experts, "cpu_fused_moe", None), getattr(method, "cpu_fused_moe", None), method):
        if found is not None:
            return " ".join(filter(None, (type(found).__name__, getattr(found, "isa", ""))))
    return "an unknown kernel"


class Key:
    """Config, layer, dtype and tensors of a block, and whose kernels it has; equal where all of them are."""

    def __init__(self, config: str, layer: int, dtype: torch.dtype, tensors: Tensors, platform: Platform) -> None:
        self.config, self.layer, self.dtype, self.tensors, self.platform = config, layer, dtype, tensors, platform
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self.identity = (config, layer, dtype, platform, digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


class Block:
    """A filled block. root: the module whose forward is the block; experts: vLLM's expert layer in it.

    output_scale: what the model multiplies the sum by, which vLLM has in the weights. model: that it is of.
    """

    def __init__(
        self,
        config: Any,
        root: nn.Module,
        experts: nn.Module,
        dtype: torch.dtype,
        platform: Platform,
        output_scale: float,
        model: nn.Module,
    ) -> None:
        self.model = model
        self.config, self.root, self.experts, self.dtype, self.platform = config, root, experts, dtype, platform
        # A weight of vLLM's router, times this, is a weight of the model.
        self.scale = _late_scale(root, experts) / output_scale
        self.takes = inspect.signature(root.forward).parameters
        # Blocks of vLLM's backend for transformers are transformers' own, which take sequences.
        self.in_sequences = type(root).__module__.startswith("transformers.")

    @property
    def name(self) -> str:
        return type(self.root.layer if isinstance(self.root, Around) else self.root).__name__

    @contextmanager
    def running(self) -> Iterator[None]:
        with as_on(self.platform, self.dtype), models.current(self.config, self.dtype):
            yield

    def __call__(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        x = x[None] if self.in_sequences else x
        answer = self.root(x, **({"input_ids": token_ids} if "input_ids" in self.takes else {}))
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output


# Two: a block with its own tensors and with others.
_CACHED: dict[Key, Block] = {}
_KEPT = 2


def _ready(key: Key) -> Block:
    """A new block of these tensors; the last few that ran are kept."""
    while len(_CACHED) >= _KEPT:
        del _CACHED[next(iter(_CACHED))]
    return _built(key)


@cache
def _settle() -> None:
    """Keep what was imported by now out of every later collection, which would take a third of a second each."""
    gc.freeze()


def _built(key: Key) -> Block:
    """Build the model, load the layer's tensors, and make the block ready as vLLM does after loading."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    found = loaded(json.loads(key.config), key.layer, key.dtype, key.tensors, platform=key.platform)
    with found.running(), refusals():
        process_weights_after_loading(found.root, found.config.model_config, torch.device(device.kind()))
    return found


@contextmanager
def as_on(platform: Platform, dtype: torch.dtype) -> Iterator[None]:
    """Inside, blocks are made and run with the experts and routers that vLLM has there, as far as they run here."""
    if platform == "native":
        yield
        return
    interpreted.require(dtype)
    with routing.routers_of(platform), experts_of("triton"), scratch():
        yield


def loaded(
    config: Any, number: int, dtype: torch.dtype, tensors: Tensors, runs: bool = True, platform: Platform = "native"
) -> Block:
    """The block of a layer with these tensors, as its loader leaves it. runs: as for models.build.

    Blocks that went are collected here: vLLM's handles of prepacked weights call torch when they go, which must not be
    while torch traces for somebody else; nor may hundreds of models wait for a collection.
    """
    gc.collect()
    record, values = models.as_published(config)
    with as_on(platform, dtype), models.folder_of(record, values) as folder:
        built = models.build(folder, dtype, runs)
    layer = next((layer for layer in built.moe_layers() if layer.number == number), None)
    if layer is None:
        raise ConfigError(f"{type(built.model).__name__}: layer {number} has no routed experts")
    with models.current(built.config, dtype):
        built.model.load_weights(iter(list(checkpoint_of(record, values, number, tensors))))
    whole = built.model.get_submodule(layer.path)
    written = [name for name, parameter in whole.named_parameters() if not servers.unwritten(parameter).any()]
    inner = layer.inner.partition(".")[0]
    outside = [name for name in written if not name.startswith(f"{inner}.")]
    root = whole_layer(whole, written) if outside or "." not in layer.inner else whole.get_submodule(inner)
    left = [name for name, parameter in root.named_parameters() if servers.unwritten(parameter).any()]
    if left:
        raise CheckpointError(f"{type(root).__name__}: loading left {', '.join(left)} unwritten")
    _settle()
    scale = layer_of(config, number).output_scale
    return Block(built.config, root, layer.experts, dtype, platform, scale, built.model)


# Modules whose select_experts the expert layers for CPUs of older releases call.
_PLACES = ("router.cpu_router", "cpu_fused_moe", "experts.cpu_moe")


def _modules() -> Iterator[Any]:
    for place in _PLACES:
        with contextlib.suppress(ImportError):
            yield import_module(f"vllm.model_executor.layers.fused_moe.{place}")


def routing_places(experts: Any) -> list[Any]:
    """Objects and modules whose select_experts an expert layer calls: its router's, and in older releases for CPUs a
    function of its own module."""
    return [place for place in (getattr(experts, "router", experts), *_modules()) if hasattr(place, "select_experts")]


def _late_scale(root: Any, experts: Any) -> float:
    """What an expert layer multiplies its sum by, or in 0.19 the block does; otherwise that factor is the router's."""
    runner = getattr(experts, "runner", experts)
    if hasattr(runner, "_maybe_apply_routed_scale_to_output"):
        return float(runner.routed_scaling_factor)
    return (
        1.0 if getattr(experts, "routed_scaling_factor", 1.0) != 1 else float(getattr(root, "routed_scaling_factor", 1))
    )


class Place(NamedTuple):
    """Where a routing can be listened to and replaced. A weight there, times scale, is a weight of the model."""

    owner: Any
    name: str
    scale: float


def _places(block: Block) -> list[Place]:
    """The router of identity experts answers without them: what they pass on is computed inside, of what a function of
    its module chose."""
    router = getattr(block.experts, "router", None)
    if hasattr(router, "zero_expert_output"):
        inner = float(getattr(router, "routed_scaling_factor", 1.0))
        return [Place(import_module(type(router).__module__), "fused_topk_bias", block.scale * inner)]
    return [Place(owner, "select_experts", block.scale) for owner in routing_places(block.experts)]


class Tap:
    """Inside, the expert kernel gets `given` in place of the router's answer, if there is one.

    seen: what it got, as the model's weights.
    """

    def __init__(self, block: Block, given: Routing | None) -> None:
        self.given = given
        self.seen: Routing | None = None
        self.places = _places(block)
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Tap:
        for place in self.places:
            real = getattr(place.owner, place.name)
            self._patches.enter_context(patch.object(place.owner, place.name, self._tapped(real, place.scale)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _tapped(self, real: Any, scale: float) -> Any:
        @called_by_engine
        def routed(*args: Any, **kwargs: Any) -> Any:
            weights, ids, *rest = real(*args, **kwargs)
            if self.given is not None:
                # vLLM multiplies by its scale afterwards; a given weight is the whole one.
                weights = (self.given.weights / scale).to(weights.dtype)
                ids = self.given.ids.to(ids.dtype)
            self.seen = Routing(ids.clone(), weights.float() * scale)
            return (weights, ids, *rest)

        return routed
