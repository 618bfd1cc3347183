"""Tiny real models of every MoE family of transformers, with the composite around it where the family has one."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from moe_conformance.judging import inputs
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.record import Record
from moe_conformance.model.families.tiny import EXPERTS, tiny_config


def model_class(record: Record) -> Any:
    """transformers' class that publishes checkpoints of the family; importing it takes a moment."""
    if hasattr(transformers, record.tiny.model_class):
        return getattr(transformers, record.tiny.model_class)
    folder = CONFIG_MAPPING[record.model_type].__module__.split(".")[2]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(module, record.tiny.model_class)


class Block(NamedTuple):
    """One MoE block of a model. prefix: layers.I. of its canonical names; layer: the module of the decoder layer."""

    prefix: str
    path: str
    module: Any
    layer: Any


@functools.cache
def build(family: str, widths: str = "distinct", text_only: bool = False, **own: Any) -> PreTrainedModel:
    """The model on the CPU in float32, its MoE blocks filled with hashed values. own: further keys of its config."""
    torch.manual_seed(0)
    cls, values = model_class(RECORDS[family]), tiny_config(RECORDS[family], widths, own)
    if text_only:
        cls, values = (
            getattr(importlib.import_module(cls.__module__), RECORDS[family].tiny.text_class),
            values.text_config,
        )
    model: PreTrainedModel = cls(values).eval()
    for block in blocks(model):
        parts = [block.module] if block.module is not block.layer else _gemma_parts(block.layer)
        parts += [block.layer.shared_mlp] if hasattr(block.layer, "shared_mlp") else []
        parts += [block.module.shared_experts] if hasattr(block.module, "shared_experts") else []
        for number, part in enumerate(parts):
            for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
                _fill(tensor.data, name, f"{family} {block.path} {number} {name}")
    return model


def _gemma_parts(layer: Any) -> list[nn.Module]:
    own = ("mlp", "router", "experts", "pre_feedforward_layernorm", "post_feedforward_layernorm_1")
    return [layer.get_submodule(n) for n in (*own, "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")]


def _fill(tensor: Tensor, name: str, seed: str) -> None:
    if tensor.dtype == torch.int64:  # ids of experts by token id: K different ones a row
        tensor.copy_(inputs.bits((tensor.shape[0], EXPERTS), seed).argsort(-1)[:, : tensor.shape[1]])
        return
    value = inputs.normal(tensor.shape, seed, std=0.25 if tensor.ndim > 1 else 0.5)
    near_one = "norm" in name or name.endswith(("scale", "norm.weight"))
    tensor.copy_(1 + value / 2 if near_one else value)
    if name.endswith("balancing_biases"):  # zaya: from_pretrained of 5.23 sets this one to -1, whatever the file says
        tensor[-1] = -1.0


def is_moe(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if {"input_linear", "output_linear", "router"} <= children.keys() or "router_gate" in children:
        return True
    return "experts" in children


def blocks(model: nn.Module) -> Iterator[Block]:
    """Every MoE block; encoder.layers.I. of an encoder-decoder's encoder, layers.I.vision. of experts for images."""
    two_stacks = any(name in ("decoder", "model.decoder") for name, _ in model.named_modules())
    for path, module in model.named_modules():
        found = re.search(r"(.*(?:layers|blocks|block))\.(\d+)", path)
        if found is None or "attention" in path or not is_moe(module):
            continue
        if "encoder.language_model" in path:  # diffusion_gemma: the decoder's own parameters again
            continue
        index = re.search(r"(?:layers|blocks|block)\.(\d+)", path)
        assert index is not None
        prefix = "encoder.layers" if two_stacks and "encoder" in path and "blocks" not in path else "layers"
        vision = "vision." if path.endswith("vision_moe") else ""
        layer = model.get_submodule(path[: index.end()])
        yield Block(f"{prefix}.{index[1]}.{vision}", path, module, layer)


# Parameters of a block, by name within it, that are canonical tensors as they are.
SAME = {
    **dict.fromkeys(
        (
            "gate.weight",
            "gate.wg.weight",
            "router.weight",
            "router.gate.weight",
            "router.layer.weight",
            "router.classifier.weight",
            "router.proj.weight",
            "router_gate.weight",
            "gate.router_mlp.out_proj.weight",
        ),
        "router.proj",
    ),
    **dict.fromkeys(
        (
            "e_score_correction_bias",
            "expert_bias",
            "gate.e_score_correction_bias",
            "gate.balancing_biases",
            "router.e_score_correction_bias",
        ),
        "router.selection_bias",
    ),
    "router.bias": "router.bias",
    "router.classifier.bias": "router.bias",
    "router.scale": "router.scale",
    "router.per_expert_scale": "router.per_expert_scale",
    "gate.global_scale": "router.global_scale",
    "gate.tid2eid": "router.table",
    "gate.down_proj.weight": "router.down.weight",
    "gate.down_proj.bias": "router.down.bias",
    "gate.router_states_scale": "router.state_scale",
    "gate.router_mlp.norm.weight": "router.norm",
    **{f"gate.router_mlp.{name}": f"router.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
    "experts.up_proj": "experts.w1",
    "experts.down_proj_bias": "experts.b2",
    "experts.post_expert_norm.weight": "experts.output_norm",
    "input_linear.weight": "experts.w13",
    "output_linear.weight": "experts.w2",
    "shared_expert_gate.weight": "shared.gate",
    **dict.fromkeys(("fc1_latent_proj.weight", "pre_expert_proj.weight"), "latent.in"),
    **dict.fromkeys(("fc2_latent_proj.weight", "post_expert_proj.weight"), "latent.out"),
    "pre_expert_norm.weight": "latent.norm",
    "fc1_latent_proj.bias": "latent.in_bias",
    "fc2_latent_proj.bias": "latent.out_bias",
    "post_mlp_layernorm.weight": "output.norm",
    "bias": "output.bias",
    "pre_feedforward_layernorm.weight": "dense.norm",
    "post_feedforward_layernorm_1.weight": "dense.sum_norm",
    "pre_feedforward_layernorm_2.weight": "experts.norm",
    "post_feedforward_layernorm_2.weight": "experts.sum_norm",
}
TRANSPOSED = ("AriaExperts", "GptOssExperts", "Llama4TextExperts", "OpenAIPrivacyFilterExperts")
SEPARATE = {
    "fc1.weight": "w1",
    "wi.weight": "w1",
    "fc2.weight": "w2",
    "wo.weight": "w2",
    "fc1.bias": "b1",
    "fc2.bias": "b2",
}


def canonical(model: nn.Module) -> dict[str, Tensor]:
    """The canonical tensors as the modules hold them: written down by class, apart from the table that load uses."""
    out: dict[str, Tensor] = {}
    for block in blocks(model):
        found = _routed(block.module) | _always_on(block)
        state = dict(block.module.named_parameters()) | dict(block.module.named_buffers())
        found |= {SAME[name]: tensor for name, tensor in state.items() if name in SAME}
        moe_statics = "gate.moe_statics.e_score_correction_bias"
        if moe_statics in state:
            found["router.selection_bias"] = state[moe_statics][0]
        out |= {block.prefix + name: tensor.detach() for name, tensor in found.items()}
    for block in blocks(model):  # ernie4_5_vl: text_moe and vision_moe lie beside the shared experts
        parent = block.path.rpartition(".")[0]
        if block.path.endswith("text_moe"):
            out |= {block.prefix + n: t.detach() for n, t in _shared_mlp(model.get_submodule(parent)).items()}
    return out


def _routed(block: Any) -> dict[str, Tensor]:
    experts = getattr(block, "experts", None)
    if experts is None:
        if hasattr(block, "down_embed"):  # doge: an expert is one row down and one row up
            return {"experts.w1": block.down_embed.weight[:, None], "experts.w2": block.up_embed.weight[:, :, None]}
        return {}
    children = [
        dict(child.named_parameters()) for name, child in experts.named_children() if name.startswith("expert_")
    ]
    if children:
        leaves = SEPARATE.keys() & children[0].keys()
        return {f"experts.{SEPARATE[leaf]}": torch.stack([child[leaf] for child in children]) for leaf in leaves}
    own = dict(experts.named_parameters())
    if "mlp.w1" in own:  # dbrx: the rows of one expert below those of another
        count = block.router.layer.weight.shape[0]
        gate, up, down = (own[f"mlp.{name}"].view(count, -1, own["mlp.w1"].shape[1]) for name in ("w1", "v1", "w2"))
        return {"experts.w13": torch.cat((gate, up), dim=1), "experts.w2": down.mT}
    found = {}
    kind = type(experts).__name__
    if "gate_up_proj" in own:
        first = own["gate_up_proj"].mT if kind in TRANSPOSED else own["gate_up_proj"]
        bias = own.get("gate_up_proj_bias")
        if kind == "GptOssExperts":
            first = torch.cat((first[:, 0::2], first[:, 1::2]), dim=1)
            bias = torch.cat((own["gate_up_proj_bias"][:, 0::2], own["gate_up_proj_bias"][:, 1::2]), dim=1)
        found["experts.w13"] = first[: own["down_proj"].shape[0]]  # longcat_flash has more rows than it reads
        if bias is not None:
            found["experts.b13"] = bias
    found["experts.w2"] = own["down_proj"].mT if kind in TRANSPOSED else own["down_proj"]
    return found


def _always_on(block: Block) -> dict[str, Tensor]:
    if hasattr(block.module, "down_embed"):
        return _mlp(block.module, "dense")
    if block.module is block.layer:
        return _mlp(block.layer.mlp, "dense")
    if hasattr(block.layer, "shared_mlp"):
        beside = block.layer.shared_mlp
        return {"shared.w13": beside.input_linear.weight, "shared.w2": beside.output_linear.weight}
    return _shared_mlp(block.module)


def _shared_mlp(block: Any) -> dict[str, Tensor]:
    for name in ("shared_experts", "shared_expert", "shared_mlp"):
        if isinstance(getattr(block, name, None), nn.Module):
            return _mlp(getattr(block, name), "shared")
    return {}


def _mlp(module: Any, prefix: str) -> dict[str, Tensor]:
    own = dict(module.named_parameters())
    if "gate_proj" in own:  # inkling: [n, F, H], and [n, H, F]
        gate, up = own["gate_proj"].flatten(0, 1), own["up_proj"].flatten(0, 1)
        return {f"{prefix}.w13": torch.cat((gate, up)), f"{prefix}.w2": torch.cat(list(own["down_proj"]), dim=1)}
    down = {f"{prefix}.w2": own["down_proj.weight"]}
    if "gate_up_proj.weight" in own:
        return down | {f"{prefix}.w13": own["gate_up_proj.weight"]}
    if "gate_proj.weight" not in own:
        biases = {"up_proj.bias": "b1", "down_proj.bias": "b2"}
        down |= {f"{prefix}.{canonical}": own[name] for name, canonical in biases.items() if name in own}
        return down | {f"{prefix}.w1": own["up_proj.weight"]}
    return down | {f"{prefix}.w13": torch.cat((own["gate_proj.weight"], own["up_proj.weight"]))}


# Not of a family without a router: the data set that an image is of names the expert.
FAMILIES = tuple(name for name, record in RECORDS.items() if record.names is not None)
TEXT_ONLY = tuple(name for name in FAMILIES if RECORDS[name].tiny.text_class)
