"""What a config of each class may say of how its layers compute, beside the sizes in families.py.

Each class in one or more ways: flags and choices on, off, otherwise; numbers that no class has by default.
vitpose has none: its layers have no router.
"""

from __future__ import annotations

from moe_conformance.suites.describe.families import Keys, flat_keys

# 12 experts in 4 groups: 11 do not divide.
GROUPS: Keys = {"n_group": 4, "topk_group": 2}
GROUPED: Keys = {"n_routed_experts": 12} | GROUPS
OTHERWISE_GROUPED: Keys = {"n_routed_experts": 12, "n_group": 3, "topk_group": 1}
SCALED: Keys = {"routed_scaling_factor": 3.5}
NORM: Keys = {"norm_topk_prob": True}
NO_NORM: Keys = {"norm_topk_prob": False}
GELU: Keys = {"hidden_act": "gelu"}
TANH: Keys = {"hidden_act": "gelu_pytorch_tanh"}
MLP_BIAS: Keys = {"mlp_bias": True}
SWIGLU: Keys = {"swiglu_alpha": 1.25, "swiglu_limit": 6.5}
ROUTER: Keys = {"router_bias": True, "expert_capacity": 5}
EPS: Keys = {"rms_norm_eps": 3e-5}

NOAUX = (GROUPED | SCALED | NORM | GELU, OTHERWISE_GROUPED | SCALED | NO_NORM)
NORM_OR_NOT = (NORM | GELU, NO_NORM | TANH)
ONLY_ACT = (GELU, TANH)
LIMITED: Keys = {"topk_method": "group_limited_greedy"} | GROUPED | SCALED | MLP_BIAS | GELU
GREEDY: Keys = {"topk_method": "greedy"} | GROUPED | SCALED
KIMI: Keys = {"num_experts": 12, "num_expert_group": 4, "topk_group": 2} | SCALED
# No clamp in layer 4, written as null, nor in layer 6, as 0.
LIMITS = [None, 1.5, 2.5, None, None, 3.5, 0.0, None, 4.5]
SHARED_LIMITS = [None, 5.5, None, None, 6.5, 0, None, None, 7.5]

METHODS: dict[str, tuple[Keys, ...]] = {
    "afmoe": ({"route_scale": 3.5} | GELU,),
    "aria": (GELU | MLP_BIAS,),
    "axk1": (NOAUX[0] | EPS, NOAUX[1]),
    "axk2": (NOAUX[0], SCALED | NO_NORM),
    "bailing-hybrid": (KIMI | {"moe_renormalize": True} | GELU, KIMI | {"moe_renormalize": False}),
    "beam": (NOAUX[0] | {"num_experts": 12}, NOAUX[1] | {"num_experts": 12}),
    "cohere2-moe": (
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum"} | NO_NORM | GELU,
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "average"} | NORM,
        {"expert_selection_fn": "softmax"} | NO_NORM,
    ),
    "deepseek-ocr2": (LIMITED, GREEDY),
    "deepseek-v2": (LIMITED | NORM, GREEDY | NO_NORM),
    "deepseek-v3": NOAUX,
    "deepseek-v32": NOAUX,
    "deepseek-v4": (
        {"scoring_func": "sigmoid", "swiglu_limit": 6.5, "vocab_size": 48} | SCALED | NO_NORM | MLP_BIAS | GELU,
        {"scoring_func": "sqrtsoftplus", "swiglu_limit": 2.5, "n_shared_experts": 3} | SCALED,
    ),
    "diffusion-gemma": ({"hidden_activation": "gelu"} | EPS,),
    "doge": (NORM | MLP_BIAS | GELU, NO_NORM),
    "dots1": NOAUX,
    "dots3-note": NOAUX,
    "dots3-note-vision": ({"router_scaling_factor": 3.5} | GELU,),
    "ernie4-5-moe": ({"moe_norm_min": 0.125, "use_bias": True} | GELU,),
    "ernie4-5-vl": ({"moe_norm_min": 0.125, "use_bias": True} | GELU,),
    "exaone-moe": (NOAUX[0] | {"num_experts": 12}, NOAUX[1] | {"num_experts": 12}),
    "flex-olmo": NORM_OR_NOT,
    "flint": NORM_OR_NOT,
    "gemma4": (
        {"hidden_activation": "gelu", "use_double_wide_mlp": True, "num_kv_shared_layers": 3} | EPS,
        {"use_double_wide_mlp": False, "num_kv_shared_layers": 3},
    ),
    "glm4-moe": NOAUX,
    "glm4-moe-lite": NOAUX,
    "glm4v-moe": NOAUX,
    "glm5-next": (NOAUX[0] | {"swiglu_limit": 6.5}, NOAUX[1] | {"swiglu_limit": 2.5}),
    "glm-moe-dsa": NOAUX,
    "gpt-oss": (SWIGLU | {"hidden_act": "relu"},),
    "granitemoe": ONLY_ACT,
    "granitemoe-swa": ONLY_ACT,
    "granitemoehybrid": ONLY_ACT,
    "granitemoeshared": ONLY_ACT,
    "hunyuan-v1-moe": ONLY_ACT,
    "hy-v3": (
        {"router_scaling_factor": 3.5, "enable_moe_fp32_combine": True} | MLP_BIAS | GELU,
        {"enable_moe_fp32_combine": False},
    ),
    "hy-v4": (NOAUX[0] | {"swiglu_limit": 6.5}, NOAUX[1] | {"swiglu_limit": 2.5}),
    "inkling": ({"route_scale": 3.5, "shared_expert_sink": False} | GELU,),
    "inkling2": (
        {"route_scale": 3.5, "scoring_func": "sqrtsoftplus", "mlp_gate_softcap": 3.0, "mlp_up_softcap": 9.0} | GELU,
    ),
    "jamba": ONLY_ACT,
    "jetmoe": ({"activation_function": "gelu"},),
    "kimi-linear": (KIMI | {"moe_renormalize": True} | GELU, KIMI | {"moe_renormalize": False}),
    "kolibri1": NORM_OR_NOT,
    "laguna": ({"moe_routed_scaling_factor": 3.5, "moe_router_logit_softcapping": 2.5} | GELU,),
    "lfm2-moe": (SCALED | NORM | {"use_expert_bias": False}, SCALED | NO_NORM | {"use_expert_bias": True}),
    "llama4": ({"router_jitter_noise": 0.5} | GELU,),
    "longcat-flash": (SCALED | GELU,),
    "mellum": NORM_OR_NOT,
    "mimo-v2-flash": NOAUX,
    "minimax": ONLY_ACT,
    "minimax-m2": ONLY_ACT,
    "minimax-m3-vl": (SWIGLU | SCALED | {"router_jitter_noise": 0.5},),
    "mistral4": NOAUX,
    "mistral-large4": (GROUPED | SCALED | GELU,),
    "mixtral": ONLY_ACT,
    "muse-spark": ({"output_multiplier": 0.75, "post_norm_eps": 3e-7} | SCALED | EPS | GELU,),
    "nemotron-h": (
        GROUPED | SCALED | NORM | MLP_BIAS | {"mlp_hidden_act": "gelu", "n_shared_experts": 3},
        OTHERWISE_GROUPED | SCALED | NO_NORM | {"moe_latent_size": None},
    ),
    "olmoe": NORM_OR_NOT,
    "openai-privacy-filter": (SWIGLU,),
    "phimoe": ({"router_jitter_noise": 0.125} | GELU,),
    "qwen2-moe": NORM_OR_NOT,
    "qwen3-5-moe": ONLY_ACT,
    "qwen3-moe": NORM_OR_NOT,
    "qwen3-next": NORM_OR_NOT,
    "qwen3-omni-talker": NORM_OR_NOT,
    "qwen3-omni-thinker": NORM_OR_NOT,
    "qwen3-vl-moe": ONLY_ACT,
    "qwen4-exp": (NORM, NO_NORM),
    "solar-open": NOAUX,
    "step3p7": (
        {"moe_router_scaling_factor": 3.5, "swiglu_limits": LIMITS, "swiglu_limits_shared": SHARED_LIMITS}
        | MLP_BIAS
        | GELU,
        {"swiglu_limits": None},
    ),
    "unlimited-ocr": (LIMITED, GREEDY),
    "zaya": ({"router_hidden_size": 20} | EPS | GELU,),
    "dbrx": (
        {"moe_normalize_expert_weights": 2.0, "ffn_act_fn": {"name": "gelu"}},
        {"moe_normalize_expert_weights": None},
    ),
    "nllb-moe": (
        ROUTER
        | {"activation_function": "gelu", "moe_eval_capacity_token_fraction": 0.5, "moe_token_dropout": 0.25}
        | {"normalize_router_prob_before_dropping": True, "batch_prioritized_routing": False},
        {"expert_capacity": 5, "moe_eval_capacity_token_fraction": 0.0, "batch_prioritized_routing": True},
    ),
    "switch-transformers": (ROUTER | {"dense_act_fn": "gelu"}, {"router_bias": False}),
}


# What no published config of these models sets otherwise than its class does: the activation, biases of the experts'
# projections, noise that routers add in training. An engine may have the usual value built in.
UNPUBLISHED = {
    *("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "dense_act_fn", "ffn_act_fn"),
    *("mlp_bias", "router_jitter_noise"),
}


def is_published(slug: str, way: int) -> bool:
    """Whether this way says nothing that no published config says."""
    return not METHODS[slug][way].keys() & UNPUBLISHED


def layer_keys(slug: str, way: int, published: bool = False) -> Keys:
    """The slug's config with the method keys of one way, or only with those that published configs set."""
    keys, more = flat_keys(slug), METHODS[slug][way]
    if published:
        more = {key: value for key, value in more.items() if key not in UNPUBLISHED}
    return keys | {"ffn_config": keys["ffn_config"] | more} if "ffn_config" in keys else keys | more
