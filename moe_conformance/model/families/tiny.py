"""A tiny model of each family: the config of the class that publishes its checkpoints, in the sizes below.

A size is set wherever the class has it, in any of its levels; what else a family needs is in its record. This module
imports transformers only when asked for a config.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moe_conformance.model.families.configs import Size
from moe_conformance.model.families.record import Record

# Sizes of the part with experts. 12 experts: two digits (names sort otherwise than numbers), no power of two.
EXPERTS, TOP_K, HIDDEN, LAYERS = 12, 3, 32, 3
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "num_hidden_layers": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 4,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim", "kv_lora_rank"), 8),
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "rotary_dim": 4,
    "index_topk": 8,
    "index_n_heads": 2,
    "o_lora_rank": 4,
    "o_groups": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "mamba_head_dim": 8,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "n_groups": 2,
    "mamba_dt_rank": 4,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 64),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("d_rel", "rel_extent"), 4),
    **dict.fromkeys(("hc_mult", "hc_count"), 2),
    "hc_lowrank": 4,
    **dict.fromkeys(("ple_embed_dim", "gated_norm_rank"), 8),
    "max_position_embeddings": 64,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts"), TOP_K),
    **dict.fromkeys(("moe_topk", "moe_top_k", "moe_k"), TOP_K),
    **dict.fromkeys(("n_group", "num_expert_group"), 4),
    "topk_group": 2,
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 2.5),
    **dict.fromkeys(("moe_routed_scaling_factor", "moe_router_scaling_factor"), 2.5),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 28),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 28),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 36),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
# (expert width, dense width): all different from HIDDEN, or such that 2F = H, or F = H.
WIDTHS = {"distinct": (20, 24), "square-gate-up": (16, 16), "square-down": (32, 32)}

# Sizes of everything else: towers of one layer that are never run.
OTHER: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "n_layers"), 1),
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "encoder_ffn_dim", "mlp_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim", "text_hidden_size", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "projection_hidden_dim"), 32),
    **dict.fromkeys(("projector_hidden_size", "merged_hidden_size"), 32),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 4),
    "head_dim": 8,
    "vocab_size": 64,
    "mel_vocab_size": 8,
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size"), 16),
    **dict.fromkeys(("posemb_grid_size", "pos_emb_height", "pos_emb_width"), 4),
    "downsample_hidden_size": 8,
    "deepstack_visual_indexes": [0],
    "global_attn_indexes": [0],
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "image_size": 16,
    "patch_size": 4,
    "num_code_groups": 2,
    "max_source_positions": 16,
}


def tiny_config(record: Record, widths: str = "distinct", own: Mapping[str, Any] | None = None) -> Any:
    """A config object of that class. widths: key into WIDTHS. own: further keys, by dotted path."""
    import transformers

    cls = getattr(transformers, record.published_config_class)
    width, dense = WIDTHS[widths]
    values = _shrunk(cls, TEXT | {"moe_intermediate_size": width, "intermediate_size": dense})
    for path, value in {**record.tiny.keys, **(own or {})}.items():
        *levels, key = path.split(".")
        functools.reduce(lambda level, name: level.setdefault(name, {}), levels, values)[key] = _sized(value, width)
    return cls(**values)


def _sized(value: Any, width: int) -> Any:
    if isinstance(value, list):
        return [_sized(entry, width) for entry in value]
    return width if value is Size.WIDTH else value


def _shrunk(cls: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of the sizes that the config class knows, and the same for the configs within it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    out: dict[str, Any] = {}
    for key, value in cls().to_dict().items():
        if key in cls.sub_configs:
            sub = cls.sub_configs[key]
            sub = CONFIG_MAPPING[value["model_type"]] if sub is AutoConfig else sub
            out[key] = _shrunk(sub, sizes if "text" in key or "ffn" in key else OTHER)
            if sub.model_type:
                out[key]["model_type"] = sub.model_type
        elif key in sizes:
            out[key] = sizes[key]
    return out
