"""From a config as transformers has it to one as published: its keys, its levels and its class.

vLLM and SGLang read config.json files as models were published with. Those of a few families have other class names
than transformers' own, and keys that transformers' classes derive from others or do not have at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_conformance.engine import RECORDS
from moe_conformance.model.families.configs import Size, filled

Level = Mapping[str, Any]
# By transformers' class, that of published checkpoints.
CLASSES = {
    "BailingHybridForCausalLM": "BailingMoeV2_5ForCausalLM",
    "DeepseekOcr2ForConditionalGeneration": "DeepseekOCR2ForCausalLM",
    "Dots3NoteForConditionalGeneration": "Dots3NoteForCausalLM",
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "Qwen3OmniMoeForConditionalGeneration",
    "UnlimitedOcrForConditionalGeneration": "UnlimitedOCRForCausalLM",
}
# By the text model's type, the class of its own that vLLM has, where transformers has none.
TEXT_CLASSES = {"step3p5": "Step3p5ForCausalLM"}
# By the text model's type, where published configs have the text model: under another key than transformers', or at the
# top ("").
LEVELS = {"deepseek_ocr2_text": "language_config", "dots3_note_text": "", "unlimited_ocr_text": "language_config"}
# By transformers' model type, the one that published configs have.
TYPES = {"deepseek_ocr2": "deepseek_vl_v2", "inkling_text": "inkling_model"}
# By model type, where transformers reads such checkpoints with another family's class.
OWN_CLASSES = {"sarvam_mla": "SarvamMLAForCausalLM", "sarvam_moe": "SarvamMoEForCausalLM"}


def record_of(config: Level) -> Any:
    """The record that a config is of, by its own model type or that of the level with the experts; None without."""
    level: Any = config
    while isinstance(level, Mapping):
        if (record := RECORDS.record_of(str(level.get("model_type", "")))) is not None:
            return record
        level = next((level[key] for key in ("text_config", "language_config", "thinker_config") if key in level), None)
    return None


def leveled(record: Any, config: Level) -> dict[str, Any]:
    """The same with the text model where transformers has it, if it is where published config.json files do."""
    found, level = dict(config), LEVELS.get(record.model_type, "")
    if record.wrapper is not None and level in found and record.wrapper.path[0] not in found:
        found[record.wrapper.path[0]] = found.pop(level)
    return found


def is_flat(record: Any, config: Level) -> bool:
    """Whether the top level of the config is the one that describes the experts."""
    return record.wrapper is None or not any(key in config for key in record.wrapper.path)


def architectures(record: Any, flat: bool) -> list[str]:
    """Class names of checkpoints with such a config, best first: of the text model alone, then of the whole."""
    text = [
        record.tiny.text_class,
        TEXT_CLASSES.get(record.model_type, ""),
        *architectures_of(record.model_type),
    ]
    whole = [CLASSES.get(record.tiny.model_class, ""), record.tiny.model_class]
    if (own := OWN_CLASSES.get(record.model_type)) is not None:
        return [own]
    found = [*text, *whole] if flat else whole
    return [name for name in dict.fromkeys(found) if name]


def architectures_of(model_type: str) -> list[str]:
    """Class names that transformers gives a model type, the ones with a language model's head."""
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(model_type, ())
        found += [names] if isinstance(names, str) else names
    return found


def config(record: Any, architecture: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a checkpoint of this class, from a config of the family's text model or of the whole."""
    whole = (record.tiny.model_class, CLASSES.get(record.tiny.model_class))
    if record.wrapper is not None and record.wrapper.path[0] not in values and architecture in whole:
        values = _wrapped(record, values)
    level = values
    if not is_flat(record, values):
        for key in record.wrapper.path:
            level = level[key]
    _complete(level, {**record.beside, **KEYS.get(record.model_type, {})})
    level.update(ONLY.get(record.model_type, {}))
    around: dict[str, Any] = values
    for key in record.wrapper.path[:-1] if record.wrapper else ():
        around = around.get(key) or {}
    if "vision_config" in around and around["vision_config"] is None:
        around["vision_config"] = _class_of(record).sub_configs["vision_config"]().to_dict()
    if isinstance(vision := around.get("vision_config"), dict):
        _complete(vision, VISION_KEYS.get(record.model_type, {}))
    if record.wrapper is not None:
        _complete(around, AROUND.get(record.model_type, {}))
    return values


def written(record: Any, values: Level) -> dict[str, Any]:
    """What `config` gives, with the text model under the key and type that published config.json files have."""
    found = dict(values)
    if found.get("model_type") in TYPES:
        found["model_type"] = TYPES[found["model_type"]]
    if record.wrapper is None or record.model_type not in LEVELS or record.wrapper.path[0] not in found:
        return found
    level = found.pop(record.wrapper.path[0])
    to = LEVELS[record.model_type]
    return {**found, to: level} if to else {**level, **found}


def is_lossy(record: Any, values: Level) -> bool:
    """Whether layers without experts lie between those with them, where config.json only counts the first ones."""
    level: Any = values
    for key in record.wrapper.path if record.wrapper and not is_flat(record, values) else ():
        level = level[key]
    types = list(level.get("mlp_layer_types") or ())
    return record.model_type in COUNTED and "dense" in types[[*types, "sparse"].index("sparse") :]


def _complete(level: dict[str, Any], keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if level.get(key) is None and (found := value(level) if callable(value) else value) is not None:
            level[key] = found
    for key, value in keys.items():
        if value is None:
            level.pop(key, None)


def _wrapped(record: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model, or of what is right around it, in that of the whole, which is at its defaults."""
    found: dict[str, Any] = _class_of(record)().to_dict()
    *above, last = record.wrapper.path
    if last in values:
        *above, last = above
    else:
        values = {**values, "model_type": record.model_type}
    level = found
    for key in above:
        level = level[key]
    level[last] = values
    # What the whole requires beside it, in the size of this text model.
    for key, beside in filled(record.wrapper.rest, {Size.HIDDEN: values.get("hidden_size")}).items():
        found[key] = {**(found.get(key) or {}), **beside}
    return found


def _class_of(record: Any) -> Any:
    import transformers

    return getattr(transformers, record.wrapper.config_class)


def _leading_dense(level: Level) -> int | None:
    """None of a config that says nothing of its layers' kinds."""
    types = level.get("mlp_layer_types")
    return None if types is None else [*types, "sparse"].index("sparse")


def _head_dim(level: Level) -> int:
    return int(level["hidden_size"] // level["num_attention_heads"])


def _rotary_dim(level: Level) -> int:
    rope = level.get("rope_parameters") or {}
    return int((level.get("head_dim") or _head_dim(level)) * rope.get("partial_rotary_factor", 1.0))


def _of_layers(kind: str, key: str) -> Callable[[Level], list[int]]:
    """1 for each layer of that kind, by a list of kinds."""
    return lambda level: [int(entry == kind) for entry in level.get(key) or [""] * level["num_hidden_layers"]]


# Model types whose published configs have the number of leading dense layers; a kind for each layer is transformers'.
COUNTED = frozenset(
    {
        *("axk1", "bailing_hybrid", "deepseek_ocr2_text", "deepseek_v32", "glm4_moe_lite", "glm5_next_text"),
        *("glm_moe_dsa", "hy_v3", "inkling_text", "kimi_linear", "unlimited_ocr_text"),
    }
)
PROJECTOR = {"projector_type": "linear", "input_dim": 32, "n_embed": 32}
INDEXED = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 64}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32}
# By model type, keys that its published configs have, with their value or how it follows from the others; None for keys
# that they do not have.
KEYS: Mapping[str, Mapping[str, Any | Callable[[Level], Any]]] = {
    "afmoe": {"n_group": 1, "topk_group": 1},
    "axk1": {"first_k_dense_replace": _leading_dense},
    "bailing_hybrid": {"first_k_dense_replace": _leading_dense, "use_bias": False, "use_qkv_bias": False},
    "deepseek_v4": {
        "num_hash_layers": lambda level: level.get("mlp_layer_types", []).count("hash_moe"),
        "mlp_layer_types": None,
        "compress_ratios": lambda level: [0] * level["num_hidden_layers"],
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 64,
        "o_lora_rank": 64,
        "o_groups": 1,
        "sliding_window": 128,
        **INDEXED,
    },
    "deepseek_ocr2_text": {"architectures": ["DeepseekV2ForCausalLM"], "use_mla": False},
    "deepseek_v32": {"first_k_dense_replace": _leading_dense, **LATENT, **INDEXED},
    "glm4_moe": {"head_dim": _head_dim},
    "glm4_moe_lite": {"first_k_dense_replace": _leading_dense},
    "glm4v_moe_text": {"head_dim": _head_dim, "use_qk_norm": False},
    "glm5_next_text": {
        "first_k_dense_replace": _leading_dense,
        "mhc": True,
        "mla_use_nope": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "indexer_rope_interleave": True,
    },
    "glm_moe_dsa": {"first_k_dense_replace": _leading_dense, **LATENT, **INDEXED},
    "hy_v3": {
        "first_k_dense_replace": _leading_dense,
        "expert_hidden_dim": lambda level: level["moe_intermediate_size"],
        "route_norm": True,
    },
    "kimi_linear": {
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "kv_lora_rank": 32,
        "mla_use_nope": True,
        "linear_attn_config": lambda level: {
            "full_attn_layers": [*range(1, level["num_hidden_layers"] + 1)],
            "kda_layers": [],
            "head_dim": 32,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    },
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"num_nextn_predict_layers": 0},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": _of_layers("sliding_attention", "layer_types"),
        "layernorm_epsilon": 1e-5,
        "moe_layer_freq": _of_layers("sparse", "mlp_layer_types"),
        "sliding_window_size": lambda level: level.get("sliding_window") or 16,
        "attention_bias": False,
        "swa_num_attention_heads": lambda level: level["num_attention_heads"],
        "swa_num_key_value_heads": lambda level: level["num_key_value_heads"],
        "swa_head_dim": lambda level: level.get("head_dim") or _head_dim(level),
        "swa_v_head_dim": lambda level: level.get("v_head_dim") or level.get("head_dim") or _head_dim(level),
    },
    "minimax_m3_vl_text": {"moe_layer_freq": _of_layers("sparse", "mlp_layer_types")},
    "step3p5": {
        "moe_router_activation": "sigmoid",
        "max_position_embeddings": 64,
        "num_attention_groups": lambda level: level["num_key_value_heads"],
    },
    "minimax_m2": {"rotary_dim": _rotary_dim},
    "qwen3_omni_moe_text": {"tie_word_embeddings": False},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "qwen4_exp_text": {"output_gate_type": "silu"},
    "sarvam_moe": {"embedding_dropout": 0.0, "score_function": "sigmoid", "use_bias": False},
    "unlimited_ocr_text": {"n_group": 1, "topk_group": 1},
}
# The same, of keys that transformers does not read and that have one value in all published configs.
ONLY: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v4": {"n_shared_experts": 1},
    "inkling_text": {"shared_expert_sink": True, "use_gate_bias": True, "use_global_scale": True},
}
# The same for what is around the text model.
AROUND: Mapping[str, Mapping[str, Any | Callable[[Level], Any]]] = {
    "deepseek_ocr2_text": {"tile_tag": "2D", "projector_config": PROJECTOR},
    "unlimited_ocr_text": {"tile_tag": "2D", "projector_config": PROJECTOR},
}
# The same for the config of images.
VISION_KEYS: Mapping[str, Mapping[str, Any | Callable[[Level], Any]]] = {
    "ernie4_5_vl_moe_text": {"embed_dim": lambda level: level["hidden_size"], "mlp_ratio": 1},
    "minimax_m3_vl_text": {"img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}},
    "qwen3_omni_moe_text": {"image_size": 768, "apply_vit_abs_pos_embed": True},
}
