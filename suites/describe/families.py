"""One small config of every config class with routed experts (transformers 5.23), in the spelling of the hub.

No two roles share a number, and none is a class default: a value read from the wrong key shows.
"""

from __future__ import annotations

from typing import Any

LAYERS, HIDDEN, HEADS, EXPERTS, TOP_K = 9, 40, 5, 11, 3
WIDTH, DENSE_WIDTH, SHARED_WIDTH, LATENT = 24, 56, 22, 16
LEADING_DENSE = 4

Keys = dict[str, Any]
SIZES: Keys = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
NUM_EXPERTS: Keys = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
NUM_LOCAL: Keys = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
N_ROUTED: Keys = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K}
PER_TOKEN: Keys = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
TOP_K_EXPERTS: Keys = {"num_experts": EXPERTS, "top_k_experts": TOP_K}
MOE_K: Keys = {"moe_num_experts": EXPERTS, "moe_k": TOP_K}

MOE_WIDTH: Keys = {"moe_intermediate_size": WIDTH}
OWN_WIDTH: Keys = {"moe_intermediate_size": WIDTH, "intermediate_size": DENSE_WIDTH}
PLAIN_WIDTH: Keys = {"intermediate_size": WIDTH}

# MoE layers 1, 4, 5, 6, 8: no leading block, no period.
SCATTERED = ["dense", "sparse", "dense", "dense", "sparse", "sparse", "sparse", "dense", "sparse"]
TYPES: Keys = {"mlp_layer_types": SCATTERED}
FIRST_K: Keys = {"first_k_dense_replace": LEADING_DENSE}
SECOND_OF_TWO: Keys = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}

# One group: 11 experts do not divide.
GROUPS: Keys = {"n_group": 1, "topk_group": 1}

N_SHARED: Keys = {"n_shared_experts": 2}
NUM_SHARED: Keys = {"num_shared_experts": 2}
MOE_SHARED: Keys = {"moe_num_shared_experts": 2}
ONE_SHARED: Keys = {"shared_expert_intermediate_size": SHARED_WIDTH}
WIDE_SHARED: Keys = {"shared_intermediate_size": SHARED_WIDTH}

# Keys that published config.json files carry to say what the model does anyway. Few classes read them; some engines do,
# and raise where they are not there.
NOAUX_TC: Keys = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SAID_BESIDE: dict[str, Keys] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True},
    "axk1": NOAUX_TC,
    "bailing-hybrid": {"score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "deepseek-ocr2": {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek-v2": {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek-v3": NOAUX_TC,
    "deepseek-v32": NOAUX_TC,
    "dots1": NOAUX_TC,
    "exaone-moe": NOAUX_TC,
    "glm-moe-dsa": NOAUX_TC,
    "glm4-moe-lite": NOAUX_TC,
    "kimi-linear": {"moe_router_activation_func": "sigmoid", "use_grouped_topk": True},
    "longcat-flash": {"zero_expert_type": "identity"},
    "mimo-v2-flash": NOAUX_TC,
    "minimax-m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "unlimited-ocr": {"topk_method": "greedy", "scoring_func": "softmax"},
}

# Slug -> config class, its keys. SIZES are added where the class takes them.
FAMILIES: dict[str, tuple[str, Keys]] = {
    "afmoe": ("AfmoeConfig", NUM_EXPERTS | OWN_WIDTH | NUM_SHARED | {"num_dense_layers": LEADING_DENSE}),
    "aria": ("AriaTextConfig", {"moe_num_experts": EXPERTS, "moe_topk": TOP_K} | PLAIN_WIDTH | MOE_SHARED),
    "axk1": ("AXK1Config", N_ROUTED | OWN_WIDTH | GROUPS | TYPES | N_SHARED),
    "axk2": ("AXK2Config", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "bailing-hybrid": ("BailingHybridConfig", PER_TOKEN | OWN_WIDTH | GROUPS | TYPES | NUM_SHARED),
    "beam": ("BeamConfig", NUM_EXPERTS | OWN_WIDTH | GROUPS | TYPES),
    "cohere2-moe": (
        "Cohere2MoeConfig",
        NUM_EXPERTS | PLAIN_WIDTH | TYPES | NUM_SHARED | {"prefix_dense_intermediate_size": DENSE_WIDTH},
    ),
    "deepseek-ocr2": ("DeepseekOcr2TextConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "deepseek-v2": ("DeepseekV2Config", N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED),
    "deepseek-v3": ("DeepseekV3Config", N_ROUTED | OWN_WIDTH | GROUPS | FIRST_K | N_SHARED),
    "deepseek-v32": ("DeepseekV32Config", N_ROUTED | OWN_WIDTH | GROUPS | TYPES | N_SHARED),
    "deepseek-v4": ("DeepseekV4Config", N_ROUTED | MOE_WIDTH | {"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 7}),
    "diffusion-gemma": ("DiffusionGemmaTextConfig", TOP_K_EXPERTS | OWN_WIDTH),
    "doge": ("DogeConfig", NUM_EXPERTS | PLAIN_WIDTH | {"is_moe": True}),
    "dots1": ("Dots1Config", N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED),
    "dots3-note": (
        "Dots3NoteTextConfig",
        N_ROUTED | OWN_WIDTH | TYPES | N_SHARED | {"shared_experts_intermediate_size": SHARED_WIDTH},
    ),
    "dots3-note-vision": (
        "Dots3NoteVisionConfig",
        OWN_WIDTH
        | {
            "num_experts_per_tok": TOP_K,
            "pyramid_num_routed": [-1, -1, 2, -1, 5, 7, 11, -1, 13],
            "adapter_in_dim": HIDDEN,
        },
    ),
    "ernie4-5-moe": (
        "Ernie4_5_MoeConfig",
        MOE_K
        | OWN_WIDTH
        | MOE_SHARED
        | {"moe_layer_start_index": 2, "moe_layer_end_index": 6, "moe_layer_interval": 2},
    ),
    "ernie4-5-vl": (
        "Ernie4_5_VLMoeTextConfig",
        MOE_K
        | OWN_WIDTH
        | TYPES
        | MOE_SHARED
        | {
            "moe_intermediate_size": [WIDTH, LATENT],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    ),
    "exaone-moe": ("ExaoneMoeConfig", NUM_EXPERTS | OWN_WIDTH | TYPES | NUM_SHARED),
    "flex-olmo": ("FlexOlmoConfig", NUM_EXPERTS | PLAIN_WIDTH),
    "flint": ("FlintConfig", NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO),
    "gemma4": ("Gemma4TextConfig", TOP_K_EXPERTS | OWN_WIDTH | {"enable_moe_block": True}),
    "glm4-moe": ("Glm4MoeConfig", N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "glm4v-moe": ("Glm4vMoeTextConfig", N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED),
    "glm5-next": ("Glm5NextTextConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "glm-moe-dsa": ("GlmMoeDsaConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "gpt-oss": ("GptOssConfig", NUM_LOCAL | PLAIN_WIDTH),
    "granitemoe": ("GraniteMoeConfig", NUM_LOCAL | PLAIN_WIDTH),
    "granitemoe-swa": ("GraniteMoeSWAConfig", NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED),
    "granitemoehybrid": ("GraniteMoeHybridConfig", NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED | {"mamba_n_heads": 10}),
    "granitemoeshared": ("GraniteMoeSharedConfig", NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED),
    "hunyuan-v1-moe": (
        "HunYuanMoEV1Config",
        {"num_experts": EXPERTS, "moe_topk": TOP_K} | PLAIN_WIDTH | {"head_dim": 8},
    ),
    "hy-v3": ("HYV3Config", NUM_EXPERTS | OWN_WIDTH | TYPES | NUM_SHARED),
    "hy-v4": ("HYV4Config", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "inkling": ("InklingTextConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "inkling2": ("Inkling2TextConfig", N_ROUTED | MOE_WIDTH),
    "jamba": ("JambaConfig", NUM_EXPERTS | PLAIN_WIDTH | {"expert_layer_period": 4, "expert_layer_offset": 2}),
    "jetmoe": ("JetMoeConfig", NUM_LOCAL | PLAIN_WIDTH),
    "kimi-linear": ("KimiLinearConfig", PER_TOKEN | OWN_WIDTH | TYPES | NUM_SHARED),
    "kolibri1": ("Kolibri1Config", NUM_EXPERTS | MOE_WIDTH | ONE_SHARED),
    "laguna": ("LagunaConfig", NUM_EXPERTS | OWN_WIDTH | TYPES | ONE_SHARED),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        NUM_EXPERTS | OWN_WIDTH | {"num_dense_layers": LEADING_DENSE, "layer_types": ["full_attention"] * LAYERS},
    ),
    "llama4": (
        "Llama4TextConfig",
        NUM_LOCAL | PLAIN_WIDTH | {"intermediate_size_mlp": DENSE_WIDTH, "interleave_moe_layer_step": 4},
    ),
    "longcat-flash": (
        "LongcatFlashConfig",
        {"n_routed_experts": EXPERTS, "moe_topk": TOP_K}
        | {"expert_ffn_hidden_size": WIDTH, "ffn_hidden_size": DENSE_WIDTH, "num_layers": LAYERS, "zero_expert_num": 6},
    ),
    "mellum": ("MellumConfig", NUM_EXPERTS | OWN_WIDTH | TYPES),
    "mimo-v2-flash": ("MiMoV2FlashConfig", N_ROUTED | OWN_WIDTH | TYPES),
    "minimax": ("MiniMaxConfig", NUM_LOCAL | PLAIN_WIDTH),
    "minimax-m2": ("MiniMaxM2Config", NUM_LOCAL | PLAIN_WIDTH),
    "minimax-m3-vl": (
        "MiniMaxM3VLTextConfig",
        NUM_LOCAL | PLAIN_WIDTH | TYPES | WIDE_SHARED | {"dense_intermediate_size": DENSE_WIDTH},
    ),
    "mistral4": ("Mistral4Config", N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED),
    "mistral-large4": ("MistralLarge4TextConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "mixtral": ("MixtralConfig", NUM_LOCAL | PLAIN_WIDTH),
    "muse-spark": ("MuseSparkTextConfig", NUM_LOCAL | OWN_WIDTH | TYPES | {"moe_hidden_size": LATENT}),
    "nemotron-h": (
        "NemotronHConfig",
        N_ROUTED
        | OWN_WIDTH
        | {
            "hybrid_override_pattern": "ME*EM-EME",
            "moe_latent_size": LATENT,
            "moe_shared_expert_intermediate_size": SHARED_WIDTH,
        },
    ),
    "olmoe": ("OlmoeConfig", NUM_EXPERTS | PLAIN_WIDTH),
    "openai-privacy-filter": ("OpenAIPrivacyFilterConfig", NUM_LOCAL | PLAIN_WIDTH),
    # Its router (SparseMixer) takes two whatever the key says.
    "phimoe": ("PhimoeConfig", NUM_LOCAL | PLAIN_WIDTH | {"num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeConfig", NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO),
    "qwen3-5-moe": ("Qwen3_5MoeTextConfig", NUM_EXPERTS | MOE_WIDTH | ONE_SHARED),
    "qwen3-moe": ("Qwen3MoeConfig", NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO),
    "qwen3-next": ("Qwen3NextConfig", NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO),
    "qwen3-omni-talker": ("Qwen3OmniMoeTalkerTextConfig", NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO),
    "qwen3-omni-thinker": ("Qwen3OmniMoeTextConfig", NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO),
    "qwen3-vl-moe": ("Qwen3VLMoeTextConfig", NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO),
    "qwen4-exp": (
        "Qwen4ExpTextConfig",
        NUM_EXPERTS
        | MOE_WIDTH
        | ONE_SHARED
        | {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "head_dim": 8,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
    ),
    "solar-open": ("SolarOpenConfig", N_ROUTED | MOE_WIDTH | N_SHARED),
    "step3p7": (
        "Step3p7TextConfig",
        {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K} | OWN_WIDTH | TYPES | {"share_expert_dim": SHARED_WIDTH},
    ),
    "unlimited-ocr": ("UnlimitedOcrTextConfig", N_ROUTED | OWN_WIDTH | TYPES | N_SHARED),
    "zaya": ("ZayaConfig", NUM_EXPERTS | MOE_WIDTH | {"num_experts_per_tok": 1}),
    "dbrx": (
        "DbrxConfig",
        {
            "n_layers": LAYERS,
            "d_model": HIDDEN,
            "n_heads": HEADS,
            "attn_config": {"rope_theta": 1e4},
            "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "ffn_hidden_size": WIDTH},
        },
    ),
    "nllb-moe": (
        "NllbMoeConfig",
        {
            "d_model": HIDDEN,
            "decoder_layers": LAYERS,
            "decoder_ffn_dim": WIDTH,
            "decoder_attention_heads": HEADS,
            "decoder_sparse_step": 3,
            "encoder_layers": 14,
            "encoder_ffn_dim": WIDTH,
            "encoder_attention_heads": HEADS,
            "encoder_sparse_step": 6,
            "num_experts": EXPERTS,
        },
    ),
    "switch-transformers": (
        "SwitchTransformersConfig",
        {
            "d_model": HIDDEN,
            "d_ff": WIDTH,
            "num_heads": HEADS,
            "num_layers": 14,
            "num_sparse_encoder_layers": 2,
            "num_decoder_layers": LAYERS,
            "num_sparse_decoder_layers": 3,
            "num_experts": EXPERTS,
        },
    ),
    "vitpose-backbone": (
        "VitPoseBackboneConfig",
        {
            "num_hidden_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "mlp_ratio": 3,
            "num_experts": EXPERTS,
            "part_features": LATENT,
        },
    ),
}
CLASSES: dict[str, str] = {slug: name for slug, (name, _) in FAMILIES.items()}


def flat_keys(slug: str) -> Keys:
    """The keyword arguments of the slug's config class."""
    keys = FAMILIES[slug][1]
    if "d_model" in keys:
        return dict(keys)
    sizes = SIZES | SAID_BESIDE.get(slug, {}) | keys
    if "num_layers" in keys or "hybrid_override_pattern" in keys:
        del sizes["num_hidden_layers"]  # derived from these
    if "pyramid_num_routed" in keys:
        del sizes["num_key_value_heads"]
    return sizes


# Slug -> config class of the parent, path to the nested config, what else the parent insists on.
TEXT = ("text_config",)
Parent = tuple[str, tuple[str, ...], dict[str, Any]]
PARENTS: dict[str, Parent] = {
    "aria": ("AriaConfig", TEXT, {}),
    "deepseek-ocr2": ("DeepseekOcr2Config", TEXT, {}),
    "diffusion-gemma": ("DiffusionGemmaConfig", TEXT, {}),
    "dots3-note": (
        "Dots3NoteConfig",
        TEXT,
        {"vision_config": {"adapter_out_dim": HIDDEN}, "audio_config": {"adapter_out_dim": HIDDEN}},
    ),
    "ernie4-5-vl": ("Ernie4_5_VLMoeConfig", TEXT, {}),
    "gemma4": ("Gemma4Config", TEXT, {}),
    "glm4v-moe": ("Glm4vMoeConfig", TEXT, {}),
    "glm5-next": ("Glm5NextConfig", TEXT, {}),
    "inkling": ("InklingConfig", TEXT, {}),
    "inkling2": ("Inkling2Config", TEXT, {"vision_config": {"text_hidden_size": HIDDEN}}),
    "llama4": ("Llama4Config", TEXT, {}),
    "minimax-m3-vl": ("MiniMaxM3VLConfig", TEXT, {}),
    "mistral-large4": ("MistralLarge4Config", TEXT, {}),
    "muse-spark": ("MuseSparkConfig", TEXT, {"audio_config": {"out_hidden_size": HIDDEN}}),
    "qwen3-5-moe": ("Qwen3_5MoeConfig", TEXT, {}),
    "qwen3-omni-talker": ("Qwen3OmniMoeTalkerConfig", TEXT, {}),
    "qwen3-omni-thinker": ("Qwen3OmniMoeConfig", ("thinker_config", "text_config"), {}),
    "qwen3-vl-moe": ("Qwen3VLMoeConfig", TEXT, {}),
    "qwen4-exp": ("Qwen4ExpConfig", TEXT, {}),
    "step3p7": ("Step3p7Config", TEXT, {}),
    "unlimited-ocr": ("UnlimitedOcrConfig", TEXT, {}),
}


# transformers 4 builds this parent's text_config only where it says its type.
TYPED = {"aria": {"model_type": "aria_text"}}


def nested_keys(slug: str) -> Keys:
    """The keyword arguments of the slug's parent class."""
    _, path, rest = PARENTS[slug]
    keys = flat_keys(slug) | TYPED.get(slug, {})
    for name in reversed(path):
        keys = {name: keys}
    return keys | rest
