"""The MoE block of one layer: the real modules of its family with the canonical tensors, called as their model does.

The model is built on the meta device once for each config and layer, and its block is taken out. Where a block is not
one module (gemma4, the granites with a shared MLP) the real decoder layer runs with its attention silenced.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from moe_conformance.engine import BlockInputs, BlockOutput
from moe_conformance.engines.transformers.block_families import (
    MODEL_TYPES,
    OWN_LAYOUTS,
    PREFIXES,
    SEPARATE,
    SOURCES,
    Source,
)
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.build import as_config, build, language_part
from moe_conformance.engines.transformers.describe import decoders, is_moe, layer_lists
from moe_conformance.errors import ConfigError, InputError, Unsupported

# Those that run on a CPU.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def features() -> frozenset[str]:
    """The model types that the installed transformers has; none before 5.0, where experts are modules of their own."""
    if find_spec("transformers.integrations.moe") is None:
        return frozenset()
    here = MODEL_TYPES & set(CONFIG_MAPPING.keys())
    return here | {"dropped_ids", "expert_bounds"} | {f"implementation:{name}" for name in IMPLEMENTATIONS}


def block(inputs: BlockInputs, default_implementation: str) -> BlockOutput:
    """Output [T, H] in x's dtype, and the routing as the experts got it, None where no module shows it (doge).

    Raises InputError where a parameter or buffer of the block stays unfilled or a tensor unused, Unsupported for an
    implementation that the family ignores, and for a given routing where nothing takes one (doge).
    """
    found = _block(json.dumps(dict(inputs.config)), inputs.layer)
    _fill(found, inputs.tensors)
    _choose(found.moe, inputs.implementation, default_implementation)
    with Tap(found.moe, inputs.routing) as tap, torch.no_grad():
        output = found(inputs.x, inputs.token_ids, inputs.state)
    return BlockOutput(output.flatten(0, -2), None if inputs.routing else tap.seen)


class Block(nn.Module):
    """The module or modules of a block, and how the model calls them. forward: x [B, S, H] -> [B, S, H]."""

    def __init__(self, root: Any, moe: Any, kept_in_float32: str) -> None:
        super().__init__()
        self.root, self.moe = root, moe
        self.kept_in_float32 = kept_in_float32

    def forward(self, x: Tensor, token_ids: Tensor | None, state: Tensor | None) -> Tensor:
        offered = {"input_ids": token_ids, "prev_router_hidden_states": state}
        takes = inspect.signature(self.root.forward).parameters
        answer = self.root(x, **{name: value for name, value in offered.items() if name in takes})
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output.view_as(x)


class SharedBeside(nn.Module):
    """A Granite decoder layer, whose shared MLP stands beside the block: what its forward adds to a residual of 0."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        layer.residual_multiplier = 1.0
        silence(layer, keep=("block_sparse_moe", "shared_mlp"))

    def forward(self, x: Tensor) -> Tensor:
        self.layer.post_attention_layernorm.answer = x
        output: Tensor = self.layer(torch.zeros_like(x))
        return output


class GemmaLayer(nn.Module):
    """A Gemma 4 decoder layer: router, experts, dense MLP and their norms; the output is what its last norm gets."""

    KEEP = ("mlp", "router", "experts", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2")
    KEEP_LATER = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2")

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        layer.hidden_size_per_layer_input = 0  # its own residual branch, after the block
        del layer.layer_scalar
        layer.layer_scalar = 1.0
        silence(layer, keep=self.KEEP + self.KEEP_LATER)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.post_attention_layernorm.answer = torch.zeros_like(x)
        self.layer(x)
        output: Tensor = self.layer.post_feedforward_layernorm.got
        return output


class Silent(nn.Module):
    """Stands for a part of the layer outside the block: notes what it is given, answers `answer`, or the same."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention
        self.answer: Tensor | None = None
        self.got: Tensor | None = None

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        self.got = hidden_states
        answer = hidden_states if self.answer is None else self.answer
        return (answer, None) if self.is_attention else answer


def silence(layer: nn.Module, keep: tuple[str, ...]) -> None:
    for name, _ in list(layer.named_children()):
        if name not in keep:
            setattr(layer, name, Silent(name == "self_attn"))


@cache
def _block(config_json: str, index: int) -> Block:
    """The block of one decoder layer, on the meta device; of the encoder's where the decoder has no experts."""
    config = language_part(as_config(json.loads(config_json)))
    config._experts_implementation = "eager"
    model = build(config)
    kept = "|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in model._keep_in_fp32_modules_strict or ())
    stacks = dict(layer_lists(model))
    for name in dict.fromkeys((*decoders(stacks), *stacks)):
        layer = stacks[name][index] if index < len(stacks[name]) else None
        if layer is not None and (found := _moe(layer)) is not None:
            path, moe = found
            return Block(_root(layer, path, moe), moe, kept).eval()
    raise ConfigError(f"{config.model_type}: layer {index} has no routed experts in {', '.join(stacks)}")


def _moe(layer: nn.Module) -> tuple[str, nn.Module] | None:
    for path, module in layer.named_modules():
        if "attention" not in path and is_moe(module):
            return path, module
    return None


def _root(layer: Any, path: str, moe: Any) -> Any:
    """The module whose forward is the whole block."""
    if moe is layer:
        return GemmaLayer(layer)
    if isinstance(getattr(layer, "shared_mlp", None), nn.Module):
        return SharedBeside(layer)
    if path.endswith(".text_moe"):  # ernie4_5_vl
        parent = layer.get_submodule(path.rpartition(".")[0])
        del parent.vision_moe
        return parent
    return moe


class _Read(dict[str, Tensor]):
    """Tensors that remember which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise InputError(f"{name}: got no such tensor; the block has a parameter of it")
        self.read.add(name)
        return super().__getitem__(name)


def _fill(found: Block, tensors: Mapping[str, Tensor]) -> None:
    remembered = _Read(tensors)
    state = {}
    for name, parameter in found.root.state_dict().items():
        value = _source(found, name)(remembered, found.moe)
        if value.shape != parameter.shape:
            raise InputError(
                f"{name}: got {list(value.shape)} from the canonical tensors, want {list(parameter.shape)}"
            )
        if value.is_floating_point() and found.kept_in_float32 and re.search(found.kept_in_float32, f"mlp.{name}"):
            value = value.float()  # as from_pretrained leaves it, whatever dtype is asked for
        state[name] = value
    found.root.load_state_dict(state, assign=True)
    unused = tensors.keys() - remembered.read
    unfilled = [name for name, tensor in _tensors(found.root) if tensor.is_meta]
    if unused or unfilled:
        raise InputError(f"{type(found.moe).__name__}: tensors not used: {sorted(unused)}; not filled: {unfilled}")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _source(found: Block, name: str) -> Source:
    name = name.removeprefix("layer.")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    own = OWN_LAYOUTS.get(type(getattr(found.moe, "experts", None)).__name__, {})
    if source := own.get(name) or SOURCES.get(name):
        return source
    if match := re.fullmatch(r"experts\.expert_(\d+)\.(.+)", name):
        canonical, number = SEPARATE[match[2]], int(match[1])
        return lambda tensors, _: tensors[canonical][number]
    raise Unsupported(f"block: no canonical tensor is known for {name} of {type(found.moe).__name__}")


def _choose(moe: Any, asked: str | None, default: str) -> None:
    """Set how the experts are computed, in the config that their module reads at every call."""
    experts = getattr(moe, "experts", None)
    if hasattr(experts, "_apply_gate") and hasattr(experts, "config"):
        experts.config._experts_implementation = asked or default  # type: ignore[union-attr]
    elif asked not in (None, "eager"):
        raise Unsupported(f"block: {type(experts).__name__} ignores experts_implementation {asked!r}")
