"""Writes complete tiny Gemma 4 checkpoints, as they lie on the hub: config.json, safetensors shards, an index.

Names and shapes are those of transformers' Gemma4ForCausalLM; a test of this project holds them together.
Every tensor is bfloat16 with hashed values, so that float32 and bfloat16 engines hold the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_conformance.judging.inputs import normal
from moe_conformance.suites.load.cases import WIDTHS
from moe_conformance.suites.remap.cases import PARTS, ROUTER, spell, spell_router

LAYERS = 3
EXPERTS = 11  # two digits, and not a power of two
HEADS, HEAD_DIM, VOCAB, DENSE = 2, 32, 128, 96
STALE = "model-00003-of-00003.safetensors"  # the last in any order of names


def config(widths: str, multimodal: bool = False, layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Any]:
    """The content of config.json; nested as the multimodal model has it, or flat as the text model."""
    hidden, intermediate = WIDTHS[widths]
    text = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": DENSE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "head_dim": HEAD_DIM,
        "global_head_dim": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 256,
        "sliding_window": 64,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": None,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": True,
        "num_experts": experts,
        "top_k_experts": 2,
        "moe_intermediate_size": intermediate,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": "bfloat16",
    }
    if not multimodal:
        return {"architectures": ["Gemma4ForCausalLM"], **text}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def shapes(widths: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the hub's text model saves, packed and without a multimodal prefix."""
    hidden, intermediate = WIDTHS[widths]
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    )
    layer = {
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, hidden),
        "self_attn.k_proj.weight": (HEAD_DIM, hidden),
        "self_attn.v_proj.weight": (HEAD_DIM, hidden),
        "self_attn.o_proj.weight": (hidden, HEADS * HEAD_DIM),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "mlp.gate_proj.weight": (DENSE, hidden),
        "mlp.up_proj.weight": (DENSE, hidden),
        "mlp.down_proj.weight": (hidden, DENSE),
        "router.proj.weight": (EXPERTS, hidden),
        "router.scale": (hidden,),
        "router.per_expert_scale": (EXPERTS,),
        "experts.gate_up_proj": (EXPERTS, 2 * intermediate, hidden),
        "experts.down_proj": (EXPERTS, hidden, intermediate),
        **{f"{norm}.weight": (hidden,) for norm in norms},
    }
    named = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    return named | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def tensors(widths: str, seed: str, layers: int = LAYERS) -> dict[str, Tensor]:
    """The tensors of `shapes`, hashed, bfloat16."""
    named = shapes(widths, layers)
    return {name: normal(shape, f"{seed} {name}", torch.bfloat16, std=0.125) for name, shape in named.items()}


def styled(packed: Mapping[str, Tensor], style: str, layers: int = LAYERS) -> dict[str, Tensor]:
    """The same tensors under the names, and in the pieces, of a naming style."""
    words = style.split("-")
    renamed = dict(packed)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        gate_up, down = renamed.pop(f"{block}.experts.gate_up_proj"), renamed.pop(f"{block}.experts.down_proj")
        router = {part: renamed.pop(f"{block}.router.{part}") for part in ROUTER}
        if "packed" in words:
            renamed[spell(style, layer, "gate_up_proj")] = gate_up
            renamed[spell(style, layer, "down_proj")] = down
        else:
            for expert in range(EXPERTS):
                pieces = (*gate_up[expert].chunk(2), down[expert])
                for part, piece in zip(PARTS, pieces, strict=True):
                    renamed[spell(style, layer, part, expert)] = piece.clone()
        renamed |= {spell_router(style, layer, part): tensor for part, tensor in router.items()}
    if "multimodal" not in words:
        return renamed
    prefix = "model.language_model."
    return {n if n.startswith(prefix) else prefix + n.removeprefix("model."): t for n, t in renamed.items()}


def canonical(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `Engine.load` must return for these tensors."""
    ends = {"gate_up_proj": "w13", "down_proj": "w2", "proj.weight": "proj"}
    out = {}
    for name, tensor in packed.items():
        if ".experts." in name or ".router." in name:
            owner, part = name.removeprefix("model.").split(".experts." if ".experts." in name else ".router.")
            kind = "experts" if ".experts." in name else "router"
            out[f"{owner}.{kind}.{ends.get(part, part)}"] = tensor
    return out


def _deal(names: list[str], shards: int, shuffled: bool) -> list[list[str]]:
    """Names of each shard: runs of the model's order, or every shards-th name, last shard first."""
    if shuffled:
        return [names[i::shards] for i in range(shards)][::-1]
    size = -(-len(names) // shards)
    return [names[i * size : (i + 1) * size] for i in range(shards)]


def save(folder: Path, named: Mapping[str, Tensor], shards: int, shuffled: bool = False) -> None:
    """Write named tensors as model.safetensors, or as shards with model.safetensors.index.json."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file({n: t.contiguous() for n, t in named.items()}, folder / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_deal(list(named), shards, shuffled), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({n: named[n].contiguous() for n in names}, folder / file, metadata)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in named.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write(folder: Path, recipe: Mapping[str, Any], seed: str = "checkpoint") -> dict[str, Tensor]:
    """Write the checkpoint of a `load` case, damaged if the recipe says so; return what a load must give."""
    widths, style, layers = recipe["widths"], recipe["style"], recipe.get("layers", LAYERS)
    packed = tensors(widths, seed, layers)
    named = styled(packed, style, layers)
    damage = recipe.get("damage")
    if damage in _TENSOR_DAMAGE:
        _TENSOR_DAMAGE[damage](named, style)
    (folder / "config.json").write_text(json.dumps(config(widths, "multimodal" in style, layers), indent=2))
    save(folder, named, recipe["shards"], recipe["shuffled"])
    if recipe.get("stale_file"):
        save_file(styled(tensors(widths, "stale"), style), folder / STALE, {"format": "pt"})
    # The experts of the last layer lie in the last shard.
    last = folder / f"model-{recipe['shards']:05}-of-{recipe['shards']:05}.safetensors"
    if damage == "missing-shard":
        last.unlink()
    elif damage == "truncated-shard":
        last.write_bytes(last.read_bytes()[:-4096])
    elif damage is not None and damage not in _TENSOR_DAMAGE:
        raise ValueError(f"damage: got {damage!r}, want one of {[*_TENSOR_DAMAGE, 'missing-shard', 'truncated-shard']}")
    return canonical(packed)


def _missing_expert(named: dict[str, Tensor], style: str) -> None:
    for part in PARTS:
        del named[spell(style, 1, part, EXPERTS - 1)]


def _missing_up(named: dict[str, Tensor], style: str) -> None:
    del named[spell(style, 1, "up_proj", EXPERTS - 1)]


def _up_beside(named: dict[str, Tensor], style: str) -> None:
    """One expert's up by itself, with other values than in the packed tensor."""
    both = named[spell(style, 1, "gate_up_proj")]
    named[spell(style.replace("packed", "plain"), 1, "up_proj", 0)] = -both[0].chunk(2)[1]


def _extra_expert(named: dict[str, Tensor], style: str) -> None:
    for part in PARTS:
        named[spell(style, 1, part, EXPERTS)] = named[spell(style, 1, part, 0)].clone()


def _short_expert(named: dict[str, Tensor], style: str) -> None:
    name = spell(style, 1, "down_proj", EXPERTS - 1)
    named[name] = named[name][:, :-16]


def _wide_expert(named: dict[str, Tensor], style: str) -> None:
    name = spell(style, 1, "down_proj", EXPERTS - 1)
    named[name] = torch.cat([named[name], named[name][:, :16]], dim=1)


def _unknown_suffix(named: dict[str, Tensor], style: str) -> None:
    named[spell(style, 1, "up_proj", 0, "weight_offset")] = named[spell(style, 1, "up_proj", 0)].clone()


def _unknown_tensor(named: dict[str, Tensor], style: str) -> None:
    named[spell(style, 1, "side_proj")] = named[spell(style, 1, "down_proj")].clone()


def _unknown_router_tensor(named: dict[str, Tensor], style: str) -> None:
    named[spell_router(style, 1, "offset")] = named[spell_router(style, 1, "scale")].clone()


def _extra_layer(named: dict[str, Tensor], style: str) -> None:
    for part in ("gate_up_proj", "down_proj"):
        named[spell(style, LAYERS, part)] = named[spell(style, 1, part)].clone()


def _far_layer(named: dict[str, Tensor], style: str) -> None:
    for part in ("gate_up_proj", "down_proj"):
        named[spell(style, LAYERS + 2, part)] = named[spell(style, 1, part)].clone()


def _more_experts(named: dict[str, Tensor], style: str) -> None:
    for part in ("gate_up_proj", "down_proj"):
        name = spell(style, 1, part)
        named[name] = torch.cat([named[name], named[name][:1]])


def _router_transposed(named: dict[str, Tensor], style: str) -> None:
    name = spell_router(style, 1, "proj.weight")
    named[name] = named[name].T


def _missing_layer(named: dict[str, Tensor], style: str) -> None:
    del named[spell(style, 1, "gate_up_proj")]


def _fewer_experts(named: dict[str, Tensor], style: str) -> None:
    for part in ("gate_up_proj", "down_proj"):
        named[spell(style, 1, part)] = named[spell(style, 1, part)][:-1]


def _transposed(named: dict[str, Tensor], style: str) -> None:
    name = spell(style, 1, "gate_up_proj")
    named[name] = named[name].transpose(1, 2)


def _missing_router_scale(named: dict[str, Tensor], style: str) -> None:
    del named[spell_router(style, 1, "per_expert_scale")]


_TENSOR_DAMAGE = {
    "missing-expert": _missing_expert,
    "missing-up": _missing_up,
    "up-beside": _up_beside,
    "extra-expert": _extra_expert,
    "short-expert": _short_expert,
    "wide-expert": _wide_expert,
    "unknown-suffix": _unknown_suffix,
    "unknown-tensor": _unknown_tensor,
    "unknown-router-tensor": _unknown_router_tensor,
    "extra-layer": _extra_layer,
    "far-layer": _far_layer,
    "more-experts": _more_experts,
    "router-transposed": _router_transposed,
    "missing-layer": _missing_layer,
    "fewer-experts": _fewer_experts,
    "transposed": _transposed,
    "missing-router-scale": _missing_router_scale,
}
