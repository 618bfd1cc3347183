"""The MoE block of one layer: the real modules of its family, filled with the canonical tensors, called as in the
model.

The model is built on the meta device once for each config and layer, and its block is taken out. If a block is not one
module (gemma4, the granites with a shared MLP), the real decoder layer runs with its attention silenced.
"""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from moe_conformance.engine import BlockInputs, BlockOutput, called_by_engine
from moe_conformance.engines.transformers.block_families import MODEL_TYPES
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.build import as_config, build, language_part
from moe_conformance.engines.transformers.describe import decoders, is_moe, layer_lists
from moe_conformance.engines.transformers.filling import fill
from moe_conformance.errors import ConfigError, Unsupported

# Those that run on a CPU.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def model_types() -> frozenset[str]:
    """Those that the installed transformers has."""
    return MODEL_TYPES & set(CONFIG_MAPPING.keys())


def features() -> frozenset[str]:
    offered = {"dropped_ids", "expert_bounds", "same_bits", *(f"implementation:{name}" for name in IMPLEMENTATIONS)}
    return model_types() | offered


def block(inputs: BlockInputs, default_implementation: str) -> BlockOutput:
    """Output [T, H] in x's dtype, and the routing that the experts received; None if no module shows it (doge).

    Raises InputError where a parameter or buffer of the block stays unfilled or a tensor unused, Unsupported for an
    implementation that the family ignores, and for a given routing where nothing takes one (doge).
    """
    found = block_of(json.dumps(dict(inputs.config)), inputs.layer)
    fill(found, inputs.tensors)
    choose(found.moe, inputs.implementation, default_implementation)
    with Tap(found.moe, inputs.routing, inputs.native_ids) as tap, torch.no_grad():
        output = found(inputs.x, inputs.token_ids, inputs.state)
    return BlockOutput(output.flatten(0, -2), None if inputs.routing else tap.seen)


class Block(nn.Module):
    """The module or modules of a block, and how the model calls them. forward: x [B, S, H] -> [B, S, H]."""

    def __init__(self, config: Any, root: Any, moe: Any, kept_in_float32: str) -> None:
        super().__init__()
        self.config, self.root, self.moe = config, root, moe
        self.kept_in_float32 = kept_in_float32

    def forward(self, x: Tensor, token_ids: Tensor | None, state: Tensor | None) -> Tensor:
        offered = {"input_ids": token_ids, "prev_router_hidden_states": state}
        takes = inspect.signature(self.root.forward).parameters
        answer = self.root(x, **{name: value for name, value in offered.items() if name in takes})
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output.view_as(x)

    def stays_in_float32(self, name: str) -> bool:
        """Whether from_pretrained leaves this parameter in float32, whatever dtype is asked for."""
        return bool(self.kept_in_float32 and re.search(self.kept_in_float32, f"mlp.{name}"))


class SharedBeside(nn.Module):
    """A Granite decoder layer, whose shared MLP is outside the block: what its forward adds to a residual of 0."""

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
    """Replaces a part of the layer outside the block: records its input, returns `answer`, or the input."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention
        self.answer: Tensor | None = None
        self.got: Tensor | None = None

    @called_by_engine
    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        self.got = hidden_states
        answer = hidden_states if self.answer is None else self.answer
        return (answer, None) if self.is_attention else answer


def silence(layer: nn.Module, keep: tuple[str, ...]) -> None:
    for name, _ in list(layer.named_children()):
        if name not in keep:
            setattr(layer, name, Silent(name == "self_attn"))


@cache
def block_of(config_json: str, index: int) -> Block:
    """The block of one decoder layer, on the meta device; of an encoder layer if the decoder has no experts."""
    config = language_part(as_config(json.loads(config_json)))
    config._experts_implementation = "eager"
    model = build(config)
    kept = "|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in model._keep_in_fp32_modules_strict or ())
    stacks = dict(layer_lists(model))
    for name in dict.fromkeys((*decoders(stacks), *stacks)):
        layer = stacks[name][index] if index < len(stacks[name]) else None
        if layer is not None and (found := _moe(layer)) is not None:
            path, moe = found
            return Block(config, _root(layer, path, moe), moe, kept).eval()
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


def choose(moe: Any, asked: str | None, default: str) -> None:
    """Choose the experts' implementation, in the config that their module reads at every call."""
    experts = getattr(moe, "experts", None)
    if hasattr(experts, "_apply_gate") and hasattr(experts, "config"):
        experts.config._experts_implementation = asked or default  # type: ignore[union-attr]
    elif asked not in (None, "eager"):
        raise Unsupported(f"block: {type(experts).__name__} ignores experts_implementation {asked!r}")
