"""The MoE block of a layer: SGLang's own model of the config, filled by its own loader, run as its layer does.

Real: the class and what it makes of the config, load_weights, what follows loading, the gate, the router, the experts
that SGLang chooses here, shared experts, the sum. Nothing of this package computes in between.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_conformance.engine import (
    RECORDS,
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
from moe_conformance.engines.sglang import device, interpreted, models, runtime
from moe_conformance.engines.sglang.built import Kernel, name_of
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import CheckpointError, ConfigError

Tensors = Mapping[str, Tensor]


def features() -> frozenset[str]:
    """Families that SGLang has a class for, and those that it runs by transformers' own."""
    falling = {model_type for model_type in RECORDS if models.falls_back(model_type)}
    return models.model_types() | falling | {"same_bits"}


@torch.no_grad()
def block(inputs: BlockInputs) -> tuple[BlockOutput, str]:
    """The answer, its routing as SGLang's router hands it to the experts; and the names of what ran.

    A block that a CPU's experts refuse is computed by a GPU's, interpreted. Unsupported has the reasons of both.
    """
    runtime.start()
    config = json.dumps(dict(inputs.config))
    key = Key(config, inputs.layer, inputs.x.dtype, inputs.tensors, "native")
    found = _take(key)
    try:
        return _run(inputs, key, found)
    except Unsupported as refusal:
        if not device.is_cpu():
            raise
        try:
            key = Key(config, inputs.layer, inputs.x.dtype, inputs.tensors, "triton")
            return _run(inputs, key, _take(key))
        except Unsupported as second:
            raise Unsupported("; ".join(dict.fromkeys((str(refusal), str(second))))) from refusal


def _run(inputs: BlockInputs, key: Key, found: Block) -> tuple[BlockOutput, str]:
    if inputs.routing is not None and getattr(found.root, "zero_expert_num", None):
        raise Unsupported(f"block: {found.name} adds its identity experts between the router and FusedMoE")
    x = inputs.x.flatten(0, -2).clone()  # a real step's activations are the block's to overwrite
    ids = None if inputs.token_ids is None else inputs.token_ids.flatten()
    with computing(key.kernel, key.dtype), refusals(), Tap(found, inputs.routing) as tap:
        output = found(x, ids)
    _CACHED[key] = found  # one that broke off half-way is not run again
    if inputs.routing is not None and tap.seen is None:
        raise Unsupported(f"block: {found.name} hands no routing to its experts where one can be put in its place")
    answer = BlockOutput(output.reshape(inputs.x.flatten(0, -2).shape), None if inputs.routing else tap.seen)
    return answer, f"{found.name}, {name_of(key.kernel, key.dtype)}"


@contextmanager
def computing(kernel: Kernel, dtype: torch.dtype) -> Iterator[None]:
    """Inside, blocks are made and run, with these experts."""
    with runtime.building(dtype), interpreted.as_gpu(dtype) if kernel == "triton" else nullcontext():
        yield


class Key:
    """Config, layer, dtype and tensors of a block, and whose experts it has; equal where all of them are."""

    def __init__(self, config: str, layer: int, dtype: torch.dtype, tensors: Tensors, kernel: Kernel) -> None:
        self.config, self.layer, self.dtype, self.tensors, self.kernel = config, layer, dtype, tensors, kernel
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self.identity = (config, layer, dtype, kernel, digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


class Block:
    """A filled block. root: the module whose forward is the block; experts: SGLang's expert layer in it.

    output_scale: what the model multiplies the sum by, which SGLang has in the weights or behind the experts. model:
    that it is of.
    """

    def __init__(self, root: nn.Module, experts: nn.Module, output_scale: float, model: nn.Module) -> None:
        self.root, self.experts, self.model = root, experts, model
        # A weight of SGLang's router, times this, is a weight of the model.
        self.scale = _late_scale(root, experts) / output_scale
        self.takes = inspect.signature(root.forward).parameters
        # Blocks of SGLang's class around transformers' models are transformers' own, which take sequences.
        self.in_sequences = type(root).__module__.startswith("transformers.")

    @property
    def name(self) -> str:
        return type(self.root.layer if isinstance(self.root, Around) else self.root).__name__

    def __call__(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        answer = self.root(x[None] if self.in_sequences else x, **step(self.takes, token_ids))
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output


def step(takes: Mapping[str, inspect.Parameter], token_ids: Tensor | None) -> dict[str, Any]:
    """What a block is told of a step, where it must be told: that it is no idle one, and the ids of its tokens."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch: SimpleNamespace | None = SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    if "forward_batch" in takes and takes["forward_batch"].default is not inspect.Parameter.empty:
        batch = None
    offered = {"forward_batch": batch, "input_ids": token_ids}
    return {name: value for name, value in offered.items() if name in takes}


def layer_step() -> dict[str, Any]:
    """What a decoder layer is told of a step, at whose start no residual has been written."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, attn_cp_metadata=None)
    with suppress(ImportError):
        from sglang.srt.layers.layer_boundary.residual import batch as residual

        residual.start(batch)
    return {"forward_batch": batch, "per_layer_input": None}


# Two: a block with its own tensors and with others.
_CACHED: dict[Key, Block] = {}
_KEPT = 2


def _take(key: Key) -> Block:
    return _CACHED.pop(key) if key in _CACHED else _ready(key)


def _ready(key: Key) -> Block:
    """A new block of these tensors; the last few that ran are kept, and what went is collected."""
    while len(_CACHED) >= _KEPT:
        del _CACHED[next(iter(_CACHED))]
    gc.collect()
    with computing(key.kernel, key.dtype):
        return loaded(json.loads(key.config), key.layer, key.dtype, key.tensors)


def loaded(config: Any, number: int, dtype: torch.dtype, tensors: Tensors) -> Block:
    """The block of a layer with these tensors, loaded and made ready as SGLang does after loading."""
    record, values = models.as_published(config, falls=True)
    with models.folder_of(values) as folder:
        built = models.build(folder, dtype)
    layer = next((layer for layer in built.moe_layers() if layer.number == number), None)
    if layer is None:
        if not any(True for _ in built.moe_layers()):
            raise Unsupported(f"SGLang's {type(built.model).__name__} has no FusedMoE, but experts of its own")
        raise ConfigError(f"{type(built.model).__name__}: layer {number} has no routed experts")
    with runtime.building(dtype), refusals():
        built.model.load_weights(iter(list(checkpoint_of(record, values, number, tensors))))
    whole = built.model.get_submodule(layer.path)
    inner = layer.inner.partition(".")[0]
    written = [name for name, parameter in whole.named_parameters() if not servers.unwritten(parameter).any()]
    outside = [name for name in written if not name.startswith(f"{inner}.")]
    root = whole_layer(whole, written, layer_step) if outside else whole.get_submodule(inner)
    if left := [name for name, parameter in root.named_parameters() if servers.unwritten(parameter).any()]:
        raise CheckpointError(f"{type(root).__name__}: loading left {', '.join(left)} unwritten")
    with runtime.building(dtype), refusals():
        for module in root.modules():
            if (method := getattr(module, "quant_method", None)) is not None:
                method.process_weights_after_loading(module)
    return Block(root, layer.experts, layer_of(config, number).output_scale, built.model)


def _late_scale(root: nn.Module, experts: Any) -> float:
    """What a block multiplies the sum by, or has its experts multiply it by, where its router has not done so."""
    config = getattr(getattr(root, "topk", None), "topk_config", None)
    if getattr(config, "apply_routed_scaling_factor_on_output", False):
        return 1.0
    own = getattr(root, "routed_scaling_factor", None) or experts.moe_runner_config.routed_scaling_factor
    return float(own or 1.0)


class Tap:
    """Inside, the experts get `given` in place of the router's answer, if there is one.

    seen: what they got, as the model's weights.
    """

    def __init__(self, block: Block, given: Routing | None) -> None:
        self.scale, self.experts, self.given = block.scale, block.experts, given
        self.seen: Routing | None = None

    def __enter__(self) -> Tap:
        self._patch = patch.object(self.experts, "forward", self._tapped(self.experts.forward))
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _tapped(self, real: Any) -> Any:
        @called_by_engine
        def forward(hidden_states: Tensor, topk_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self.given is not None:
                # The block multiplies by its scale afterwards; a given weight is the whole one.
                weights = (self.given.weights / self.scale).to(topk_output.topk_weights.dtype)
                topk_output = topk_output._replace(
                    topk_weights=weights, topk_ids=self.given.ids.to(topk_output.topk_ids.dtype)
                )
            weights, ids = topk_output.topk_weights, topk_output.topk_ids
            self.seen = Routing(ids.clone(), weights.float() * self.scale)
            return real(hidden_states, topk_output, *args, **kwargs)

        return forward


@contextmanager
def stopping(experts: Any) -> Iterator[list[Any]]:
    """Inside, what the experts are handed is noted, and they compute nothing."""
    heard: list[Any] = []

    @called_by_engine
    def forward(hidden_states: Tensor, topk_output: Any, *_: Any, **__: Any) -> Tensor:
        heard.append(topk_output)
        return torch.zeros_like(hidden_states)

    with patch.object(experts, "forward", forward):
        yield heard
