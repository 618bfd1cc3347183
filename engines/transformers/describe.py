"""What a config says about its experts, read from the model that transformers builds from it.

Widths and counts are parameter shapes, and top-k is the width of the ids that a forward of each MoE block hands to
its experts; config keys are not consulted. So it is an opinion independent of the reference, which reads keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import MoESpec
from moe_conformance.engines.transformers.build import as_config, build, language_part
from moe_conformance.errors import ConfigError, DenseModelError, Unsupported

LAYER_LISTS = ("layers", "layer", "blocks", "block")
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")

# Routers that pass masks to their experts, so that no ids can be seen; K is fixed in their forward.
FIXED_TOP_K = {
    "NllbMoeTop2Router": 2,  # transformers 5.23 modeling_nllb_moe.py, lines 222 and 231: argmax twice
    "SwitchTransformersTop1Router": 1,  # transformers 5.23 modeling_switch_transformers.py, line 103: one argmax
}

# Classes of `shared_experts` that are one expert, of a width of its own; the others are n experts side by side.
ONE_SHARED_EXPERT = ("Kolibri1MLP", "LagunaMLP", "MiniMaxM3VLDenseMLP", "NemotronHMLP", "Step3p7MLP")


@dataclass(frozen=True)
class Block:
    """Sizes of one layer's experts. width: what the experts read, H or the latent width."""

    experts: int
    top_k: int
    hidden: int
    width: int
    intermediate: int
    shared: int
    shared_intermediate: int


def describe(config: Any) -> MoESpec:
    """config: a transformers config, nested or flat, or its dict. Raises DenseModelError without routed experts."""
    part = language_part(as_config(config))
    return _described(Spelled(type(part), part.to_json_string(use_diff=False), part))


@dataclass(frozen=True)
class Spelled:
    """A config that equals every other with the same serialised form: transformers builds the same model from both."""

    config_class: type
    text: str
    config: Any = field(compare=False)


# One: a config is described as an object and in its saved form, one after the other.
@lru_cache(maxsize=1)
def _described(spelled: Spelled) -> MoESpec:
    config = spelled.config
    model = build(config)
    lists = dict(layer_lists(model))
    blocks = {name: _blocks(layers, config) for name, layers in lists.items()}
    if not any(blocks.values()):
        stacks = ", ".join(f"{name} ({len(layers)})" for name, layers in lists.items()) or "no stack of layers at all"
        raise DenseModelError(
            f"{config.model_type}: {type(model).__name__} built from this config has no routed experts in {stacks}; "
            "it is a dense model, or the key that makes it a Mixture of Experts is off"
        )
    decoder = max(decoders(lists), key=lambda name: len(blocks[name]))
    encoder = next((name for name in lists if name not in decoders(lists)), None)
    every = list((blocks[decoder] or blocks[encoder or decoder]).values())
    first = every[0]
    return MoESpec(
        num_layers=len(lists[decoder]),
        moe_layers=tuple(blocks[decoder]),
        num_experts=_one_or_each([block.experts for block in every]),
        top_k=_one_or_each([block.top_k for block in every]),
        hidden_size=first.hidden,
        moe_intermediate_size=_one_or_each([block.intermediate for block in every]),
        shared_experts=first.shared,
        shared_intermediate_size=first.shared_intermediate or None,
        latent_size=first.width if first.width != first.hidden else None,
        encoder_moe_layers=tuple(blocks[encoder]) if encoder else (),
        layer_runs=_runs(config, len(lists[decoder])),
    )


def _runs(config: Any, layers: int) -> tuple[int, ...]:
    """The layer of each run of a model whose forward repeats layers, from the numbers that it reads in its config."""
    if not hasattr(config, "loop_num_passes"):
        return ()
    start, end = config.loop_layer_index_start, config.loop_layer_index_end
    return (*range(start), *list(range(start, end)) * config.loop_num_passes, *range(end, layers))


def _one_or_each(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost stacks of layers, by name."""
    outer: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(prefix) for prefix in outer)
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS and not inside:
            outer.append(name + ".")
            yield name, module


def decoders(names: Iterable[str]) -> list[str]:
    """The stacks of an encoder-decoder's decoder; every stack of any other model."""
    return [name for name in names if name.startswith("decoder.")] or list(names)


def _blocks(layers: nn.ModuleList, config: Any) -> dict[int, Block]:
    found = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if "attention" not in name and is_moe(module):  # jetmoe has experts of attention too
                found[index] = _read(layer, module, config)
                break
    return found


def is_moe(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return "experts" in children or {"input_linear", "output_linear", "router"} <= set(children) or _is_doge(module)


def _is_doge(module: nn.Module) -> bool:
    return {"router_gate", "down_embed", "up_embed"} <= set(dict(module.named_children()))


def _read(layer: nn.Module, block: Any, config: Any) -> Block:
    if type(block).__name__ == "VitPoseBackboneMoeMLP":
        # No router: each image's data set selects one expert, a linear map after a dense layer.
        return Block(len(block.experts), 1, block.fc1.in_features, block.fc1.in_features, block.fc1.out_features, 0, 0)
    if _is_doge(block):  # each expert is one row down and one row up, beside one dense MLP
        experts, hidden = block.down_embed.weight.shape
        return Block(experts, block.top_k, hidden, hidden, 1, 1, block.down_proj.weight.shape[1])
    router = next(child for name, child in block.named_children() if name in ("router", "gate"))
    hidden = next(p.shape[1] for p in router.parameters() if p.ndim == 2)
    experts, width, intermediate = _expert_shape(block, router)
    # dots3_note alone gives its shared experts another width than its routed ones, and they lie side by side too.
    one_shared = getattr(config, "shared_experts_intermediate_size", intermediate)
    shared, shared_intermediate = _shared(layer, one_shared)
    top_k = _top_k(block, router, hidden)
    return Block(experts, top_k, hidden, width, intermediate, shared, shared_intermediate)


def _expert_shape(block: Any, router: Any) -> tuple[int, int, int]:
    """(E, width, intermediate) from the experts' parameters."""
    if not hasattr(block, "experts"):  # jetmoe: [E, 2F, H] and [E, H, F] hang on the block
        experts, width, intermediate = block.output_linear.weight.shape
        return experts, width, intermediate
    experts = block.experts
    tensors = {name: tuple(tensor.shape) for name, tensor in experts.named_parameters()}
    if "mlp.w1" in tensors:  # dbrx: the experts stacked along rows, [E F, H]
        rows, width = tensors["mlp.w1"]
        count = router.layer.out_features
        return count, width, rows // count
    if "gate_up_proj" in tensors:
        # [E, 2F, D] with [E, D, F], or both transposed; no pair of shapes fits both.
        count, first, second = tensors["gate_up_proj"]
        intermediate = tensors["down_proj"][2] if first == 2 * tensors["down_proj"][2] else tensors["down_proj"][1]
        return count, second if first == 2 * intermediate else first, intermediate
    if "up_proj" in tensors:  # no gate: [E, F, D]
        count, intermediate, width = tensors["up_proj"]
        return count, width, intermediate
    each = [[p.shape for p in child.parameters() if p.ndim == 2] for child in experts.children()]
    each = [shapes for shapes in each if shapes]  # one module an expert, and perhaps a dropout
    if not each:
        raise Unsupported(
            f"describe: the parameters of {type(experts).__name__} are laid out in no known way: {tensors}"
        )
    intermediate, width = each[0][0]
    return len(each), width, intermediate


def _shared(layer: nn.Module, width_of_one: int) -> tuple[int, int]:
    """(how many always-on experts, their summed width)."""
    for name, module in layer.named_modules():
        own = name.rpartition(".")[2]
        if own not in SHARED_NAMES:
            continue
        down = next(t for n, t in module.named_parameters() if n.split(".")[0] in ("down_proj", "output_linear"))
        if down.ndim == 3:  # inkling: [n, H, F]
            return down.shape[0], down.shape[0] * down.shape[2]
        width = down.shape[1]
        if own != "shared_experts" or type(module).__name__ in ONE_SHARED_EXPERT:
            return 1, width
        return width // width_of_one, width
    return 0, 0


class _Seen(Exception):
    """Carries the experts' arguments out of the block's forward."""


def _top_k(block: Any, router: Any, hidden: int) -> int:
    """K as observed with three tokens in a real forward; an attribute if the experts see no ids."""
    if type(router).__name__ in FIXED_TOP_K:
        return FIXED_TOP_K[type(router).__name__]
    x = torch.empty(1, 3, hidden, device="meta")
    with torch.no_grad():
        if hasattr(block, "self_attn"):  # gemma4: the block is the decoder layer
            seen = router(x[0])
        elif hasattr(block, "experts") and not isinstance(block.experts, nn.ModuleList):
            seen = _given_to_experts(block, x)
        else:
            seen = ()
    ids = [t for t in seen if isinstance(t, Tensor) and not t.is_floating_point() and t.ndim == 2 and t.shape[0] == 3]
    if len(ids) == 1:
        return ids[0].shape[1]
    for owner in (router, block):
        if hasattr(owner, "top_k"):
            return int(owner.top_k)
    raise Unsupported(f"describe: top-k of {type(block).__name__} is in no ids and no attribute")


def _given_to_experts(block: Any, x: Tensor) -> tuple[Any, ...]:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(*args, *kwargs.values())

    extra = {}
    if getattr(block, "is_hash", False):  # deepseek_v4: routed by token id
        extra["input_ids"] = torch.zeros(1, 3, dtype=torch.long, device="meta")
    handle = block.experts.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        block(x, **extra)
    except _Seen as seen:
        return seen.args
    except RuntimeError as error:  # as with 11 experts in 8 groups
        raise ConfigError(f"config: {type(block).__name__} of this config cannot run: {error}") from error
    finally:
        handle.remove()
    return ()
