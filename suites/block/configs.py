"""One small adverse config.json of every family with routed experts (transformers 5.23), and its variants.

No two roles share a size, none is a power of two where it may be otherwise, and no scale, norm, clamp or cap is at a
value that does nothing. Where a family has groups: 12 experts in 4 groups of 3, of which 2 compete, 5 experts chosen.
Widths are multiples of 8, because grouped matrix products want rows of a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Keys = dict[str, Any]

HIDDEN, EXPERTS, TOP_K = 40, 12, 5
WIDTH, DENSE_WIDTH, SHARED_WIDTH, LATENT = 24, 56, 32, 16
SCALE = 2.5
LIMIT = 0.75  # gates and ups of the inputs spread by about 1.5, so that half of them are clamped
EPS = 0.0625  # of norms: large enough to be seen

SIZES: Keys = {"hidden_size": HIDDEN, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 2}
NUM_EXPERTS: Keys = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
NUM_LOCAL: Keys = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
N_ROUTED: Keys = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K}
PER_TOKEN: Keys = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
MOE_K: Keys = {"moe_num_experts": EXPERTS, "moe_k": TOP_K}

MOE_WIDTH: Keys = {"moe_intermediate_size": WIDTH}
OWN_WIDTH: Keys = {"moe_intermediate_size": WIDTH, "intermediate_size": DENSE_WIDTH}
PLAIN_WIDTH: Keys = {"intermediate_size": WIDTH}

TYPES: Keys = {"mlp_layer_types": ["dense", "sparse"]}
FIRST_K: Keys = {"first_k_dense_replace": 1}
SECOND_OF_TWO: Keys = {"decoder_sparse_step": 2, "mlp_only_layers": []}

GROUPS: Keys = {"n_group": 4, "topk_group": 2}
SCALED: Keys = {"routed_scaling_factor": SCALE}
NORM: Keys = {"norm_topk_prob": True}
ROUTER: Keys = GROUPS | SCALED | NORM

N_SHARED: Keys = {"n_shared_experts": 2}
NUM_SHARED: Keys = {"num_shared_experts": 2}
MOE_SHARED: Keys = {"moe_num_shared_experts": 2}
ONE_SHARED: Keys = {"shared_expert_intermediate_size": SHARED_WIDTH}
WIDE_SHARED: Keys = {"shared_intermediate_size": SHARED_WIDTH}


@dataclass(frozen=True)
class Family:
    """A config, the decoder layer judged, and what the family's modules can be asked for.

    grouped: the family reads experts_implementation. given: takes a routing instead of its router's. token_ids, state:
    its router needs them. bias: its selection bias, where hashed values would not do.
    """

    config: Keys
    layer: int = 1
    grouped: bool = True
    given: bool = True
    token_ids: bool = False
    state: bool = False
    bias: tuple[float, ...] = ()

    def but(self, **changes: Any) -> Family:
        return replace(self, config=self.config | changes)


def _family(model_type: str, *keys: Keys, sizes: Keys = SIZES, layer: int = 1, **others: Any) -> Family:
    config: Keys = {"model_type": model_type, **sizes}
    for each in keys:
        config |= each
    return Family(config, layer, **others)


_ZAYA = NUM_EXPERTS | MOE_WIDTH | {"num_experts_per_tok": 1, "router_hidden_size": LATENT, "rms_norm_eps": EPS}
_DOTS3_VISION: Keys = {
    "num_experts_per_tok": 3,
    "pyramid_num_routed": [-1, 7, 12],
    "num_hidden_layers": 3,
    "adapter_in_dim": HIDDEN,
    "router_scaling_factor": SCALE,
}
_NLLB: Keys = {
    "d_model": HIDDEN,
    "decoder_layers": 2,
    "decoder_ffn_dim": WIDTH,
    "decoder_attention_heads": 5,
    "decoder_sparse_step": 2,
    "encoder_layers": 2,
    "encoder_ffn_dim": WIDTH,
    "encoder_attention_heads": 5,
    "encoder_sparse_step": 2,
    "num_experts": EXPERTS,
    "moe_eval_capacity_token_fraction": 0.125,
    "second_expert_policy": "all",
    "router_bias": True,
}
_SWITCH: Keys = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": WIDTH,
    "num_heads": 5,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": EXPERTS,
    "expert_capacity": 2,
    "router_bias": True,
}
_DBRX: Keys = {
    "n_layers": 2,
    "d_model": HIDDEN,
    "n_heads": 5,
    "attn_config": {"rope_theta": 1e4},
    "ffn_config": {
        "moe_num_experts": EXPERTS,
        "moe_top_k": TOP_K,
        "ffn_hidden_size": WIDTH,
        "moe_normalize_expert_weights": 2.0,
    },
}
_QWEN4: Keys = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "head_dim": 8,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_V4 = N_ROUTED | MOE_WIDTH | SCALED | {"swiglu_limit": LIMIT, "vocab_size": 50}
_NEMOTRON: Keys = {
    **N_ROUTED,
    **OWN_WIDTH,
    **ROUTER,
    "hybrid_override_pattern": "ME",
    "moe_shared_expert_intermediate_size": SHARED_WIDTH,
}
_SWIGLU_OAI: Keys = {"swiglu_alpha": 1.5, "swiglu_limit": LIMIT}
_NO_SIZES: Keys = {}
_DERIVED = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}

# Slug -> its config with every knob turned; of the two settings of a switch, the richer one.
FAMILIES: dict[str, Family] = {
    "afmoe": _family("afmoe", NUM_EXPERTS, OWN_WIDTH, NUM_SHARED, {"num_dense_layers": 1, "route_scale": SCALE}),
    "aria": _family("aria_text", {"moe_num_experts": EXPERTS, "moe_topk": TOP_K}, PLAIN_WIDTH, MOE_SHARED),
    "axk1": _family("axk1", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER, {"rms_norm_eps": EPS}),
    # Experts outside the best groups count as 0 here: below 0 there must be none, or those outside would be as good.
    "axk2": _family(
        "axk2",
        N_ROUTED | OWN_WIDTH | TYPES | N_SHARED | ROUTER,
        bias=(0.125, 0.5, 0.0, 0.25, 0.0, 0.375, 0.5, 0.125, 0.0, 0.25, 0.5, 0.0),
    ),
    "bailing-hybrid": _family(
        "bailing_hybrid", PER_TOKEN, OWN_WIDTH, TYPES, NUM_SHARED, GROUPS, SCALED, {"moe_renormalize": True}
    ),
    "beam": _family("beam", NUM_EXPERTS, OWN_WIDTH, TYPES, ROUTER),
    "cohere2-moe": _family(
        "cohere2_moe",
        NUM_EXPERTS | PLAIN_WIDTH | TYPES | NUM_SHARED,
        {"prefix_dense_intermediate_size": DENSE_WIDTH, "expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {"shared_expert_combination_strategy": "average"},
    ),
    "deepseek-ocr2": _family(
        "deepseek_ocr2_text",
        N_ROUTED | OWN_WIDTH | TYPES | N_SHARED | GROUPS | SCALED | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2": _family(
        "deepseek_v2",
        N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED | GROUPS | SCALED | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek-v3": _family("deepseek_v3", N_ROUTED, OWN_WIDTH, FIRST_K, N_SHARED, ROUTER),
    "deepseek-v32": _family("deepseek_v32", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER),
    "deepseek-v4": _family("deepseek_v4", _V4, {"mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion-gemma": _family(
        "diffusion_gemma_text", OWN_WIDTH, {"num_experts": EXPERTS, "top_k_experts": TOP_K, "rms_norm_eps": EPS}
    ),
    # 12 experts would leave the 3 x 3 pairs of keys that its floor of a root gives.
    "doge": _family(
        "doge",
        {"num_experts": 49, "num_experts_per_tok": TOP_K, "is_moe": True, "norm_topk_prob": True},
        PLAIN_WIDTH,
        grouped=False,
        given=False,
    ),
    "dots1": _family("dots1", N_ROUTED, OWN_WIDTH, FIRST_K, N_SHARED, ROUTER),
    "dots3-note": _family(
        "dots3_note_text", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER, {"shared_experts_intermediate_size": 16}
    ),
    "dots3-note-vision": _family(
        "dots3_note_vision_encoder",
        OWN_WIDTH,
        {"num_attention_heads": 5, "hidden_size": HIDDEN},
        _DOTS3_VISION,
        sizes=_NO_SIZES,
        layer=2,
    ),
    "ernie4-5-moe": _family(
        "ernie4_5_moe",
        MOE_K | OWN_WIDTH | MOE_SHARED,
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1, "moe_norm_min": 0.9375},
    ),
    "ernie4-5-vl": _family(
        "ernie4_5_vl_moe_text",
        MOE_K | OWN_WIDTH | TYPES | MOE_SHARED,
        {"moe_intermediate_size": [WIDTH, LATENT], "moe_norm_min": 0.9375},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
    ),
    "exaone-moe": _family("exaone_moe", NUM_EXPERTS, OWN_WIDTH, TYPES, NUM_SHARED, ROUTER),
    "flex-olmo": _family("flex_olmo", NUM_EXPERTS, PLAIN_WIDTH, NORM),
    "flint": _family("flint", NUM_EXPERTS, OWN_WIDTH, ONE_SHARED, SECOND_OF_TWO, NORM),
    "gemma4": _family(
        "gemma4_text",
        OWN_WIDTH,
        {"num_experts": EXPERTS, "top_k_experts": TOP_K, "enable_moe_block": True, "rms_norm_eps": EPS},
    ),
    "glm4-moe": _family("glm4_moe", N_ROUTED, OWN_WIDTH, FIRST_K, N_SHARED, ROUTER),
    "glm4-moe-lite": _family("glm4_moe_lite", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER),
    "glm4v-moe": _family("glm4v_moe_text", N_ROUTED, OWN_WIDTH, FIRST_K, N_SHARED, ROUTER),
    "glm5-next": _family("glm5_next_text", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER, {"swiglu_limit": LIMIT}),
    "glm-moe-dsa": _family("glm_moe_dsa", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER),
    "gpt-oss": _family("gpt_oss", NUM_LOCAL, PLAIN_WIDTH, _SWIGLU_OAI),
    "granitemoe": _family("granitemoe", NUM_LOCAL, PLAIN_WIDTH),
    "granitemoe-swa": _family("granitemoe_swa", NUM_LOCAL, PLAIN_WIDTH, WIDE_SHARED),
    "granitemoehybrid": _family("granitemoehybrid", NUM_LOCAL, PLAIN_WIDTH, WIDE_SHARED, {"mamba_n_heads": 10}),
    "granitemoeshared": _family("granitemoeshared", NUM_LOCAL, PLAIN_WIDTH, WIDE_SHARED),
    "hunyuan-v1-moe": _family(
        "hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": [2, TOP_K], "head_dim": 8}, PLAIN_WIDTH
    ),
    "hy-v3": _family("hy_v3", NUM_EXPERTS, OWN_WIDTH, TYPES, NUM_SHARED, {"router_scaling_factor": SCALE}),
    "hy-v4": _family("hy_v4", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, ROUTER, {"swiglu_limit": LIMIT}),
    "inkling": _family("inkling_text", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, {"route_scale": SCALE}),
    "inkling2": _family(
        "inkling2_text", N_ROUTED, MOE_WIDTH, {"route_scale": SCALE, "mlp_gate_softcap": LIMIT, "mlp_up_softcap": LIMIT}
    ),
    "jamba": _family("jamba", NUM_EXPERTS, PLAIN_WIDTH, {"expert_layer_period": 2, "expert_layer_offset": 1}),
    "jetmoe": _family("jetmoe", NUM_LOCAL, PLAIN_WIDTH, grouped=False),
    "kimi-linear": _family(
        "kimi_linear",
        PER_TOKEN | OWN_WIDTH | TYPES | NUM_SHARED | SCALED,
        {"num_expert_group": 4, "topk_group": 2, "moe_renormalize": True},
    ),
    "kolibri1": _family("kolibri1", NUM_EXPERTS, MOE_WIDTH, ONE_SHARED, NORM),
    "laguna": _family(
        "laguna",
        NUM_EXPERTS | OWN_WIDTH | TYPES | ONE_SHARED,
        {"moe_routed_scaling_factor": SCALE, "moe_router_logit_softcapping": 1.25},
    ),
    "lfm2-moe": _family(
        "lfm2_moe",
        NUM_EXPERTS | OWN_WIDTH | SCALED | NORM,
        {"num_dense_layers": 1, "layer_types": ["full_attention"] * 2, "use_expert_bias": True},
    ),
    "llama4": _family(
        "llama4_text",
        NUM_LOCAL | PLAIN_WIDTH | {"intermediate_size_mlp": DENSE_WIDTH, "interleave_moe_layer_step": 2},
        grouped=False,
    ),
    "longcat-flash": _family(
        "longcat_flash",
        {
            "n_routed_experts": EXPERTS,
            "moe_topk": TOP_K,
            "expert_ffn_hidden_size": WIDTH,
            "ffn_hidden_size": DENSE_WIDTH,
        },
        {"num_layers": 2, "zero_expert_num": 6} | SCALED,
        sizes=_DERIVED,
        grouped=False,
    ),
    "mellum": _family("mellum", NUM_EXPERTS, OWN_WIDTH, TYPES, NORM),
    "mimo-v2-flash": _family("mimo_v2_flash", N_ROUTED, OWN_WIDTH, TYPES, ROUTER),
    "minimax": _family("minimax", NUM_LOCAL, PLAIN_WIDTH),
    "minimax-m2": _family("minimax_m2", NUM_LOCAL, PLAIN_WIDTH),
    "minimax-m3-vl": _family(
        "minimax_m3_vl_text",
        NUM_LOCAL | PLAIN_WIDTH | TYPES | WIDE_SHARED | SCALED | _SWIGLU_OAI,
        {"dense_intermediate_size": DENSE_WIDTH},
    ),
    "mistral4": _family("mistral4", N_ROUTED, OWN_WIDTH, FIRST_K, N_SHARED, ROUTER),
    "mistral-large4": _family("mistral_large4_text", N_ROUTED, OWN_WIDTH, TYPES, N_SHARED, GROUPS, SCALED),
    "mixtral": _family("mixtral", NUM_LOCAL, PLAIN_WIDTH),
    "muse-spark": _family(
        "muse_spark_text",
        NUM_LOCAL | OWN_WIDTH | TYPES | SCALED,
        {"moe_hidden_size": LATENT, "output_multiplier": 1.5, "rms_norm_eps": EPS, "post_norm_eps": 2 * EPS},
    ),
    "nemotron-h": _family("nemotron_h", _NEMOTRON, {"moe_latent_size": LATENT}, sizes=_DERIVED),
    "olmoe": _family("olmoe", NUM_EXPERTS, PLAIN_WIDTH, NORM),
    "openai-privacy-filter": _family("openai_privacy_filter", NUM_LOCAL, PLAIN_WIDTH, _SWIGLU_OAI),
    # Its router takes two whatever the key says.
    "phimoe": _family("phimoe", NUM_LOCAL, PLAIN_WIDTH, {"num_experts_per_tok": 2, "router_jitter_noise": 0.25}),
    "qwen2-moe": _family("qwen2_moe", NUM_EXPERTS, OWN_WIDTH, ONE_SHARED, SECOND_OF_TWO, NORM),
    "qwen3-5-moe": _family("qwen3_5_moe_text", NUM_EXPERTS, MOE_WIDTH, ONE_SHARED),
    "qwen3-moe": _family("qwen3_moe", NUM_EXPERTS, OWN_WIDTH, SECOND_OF_TWO, NORM),
    "qwen3-next": _family("qwen3_next", NUM_EXPERTS, OWN_WIDTH, ONE_SHARED, SECOND_OF_TWO, NORM),
    "qwen3-omni-talker": _family("qwen3_omni_moe_talker_text", NUM_EXPERTS, OWN_WIDTH, ONE_SHARED, SECOND_OF_TWO, NORM),
    "qwen3-omni-thinker": _family("qwen3_omni_moe_text", NUM_EXPERTS, OWN_WIDTH, SECOND_OF_TWO, NORM),
    "qwen3-vl-moe": _family("qwen3_vl_moe_text", NUM_EXPERTS, OWN_WIDTH, SECOND_OF_TWO),
    "qwen4-exp": _family("qwen4_exp_text", NUM_EXPERTS, MOE_WIDTH, ONE_SHARED, NORM, _QWEN4),
    "solar-open": _family("solar_open", N_ROUTED, MOE_WIDTH, N_SHARED, ROUTER),
    "step3p7": _family(
        "step3p5",
        {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K} | OWN_WIDTH | TYPES,
        {"share_expert_dim": SHARED_WIDTH, "moe_router_scaling_factor": SCALE},
        {"swiglu_limits": [0.0, LIMIT], "swiglu_limits_shared": [0.0, 2 * LIMIT]},
        grouped=False,
    ),
    "unlimited-ocr": _family(
        "unlimited_ocr_text",
        N_ROUTED | OWN_WIDTH | TYPES | N_SHARED | GROUPS | SCALED | {"topk_method": "group_limited_greedy"},
    ),
    "zaya": _family("zaya", _ZAYA, layer=1, state=True),
    "dbrx": _family("dbrx", _DBRX, sizes=_NO_SIZES, grouped=False),
    "nllb-moe": _family("nllb-moe", _NLLB, sizes=_NO_SIZES, grouped=False),
    "switch-transformers": _family("switch_transformers", _SWITCH, sizes=_NO_SIZES, grouped=False),
}
