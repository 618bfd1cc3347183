"""How each model family routes and computes, as data: the fields of spec.py that differ from their defaults.

Source: the modeling files of transformers 5.23, one entry for each of its 75 config classes with routed experts. A
`Key` stands for what a config says, with the default of the family's config class.

What spec.py cannot say leaves a config without layers: the experts of ViTPose, which the data set chooses; NLLB-MoE's
second expert where it is drawn at random; routers that compute in a dtype named by the config that is not float32; an
activation that is not among ACTIVATIONS. Of ERNIE 4.5 VL, whose layers have experts for text and for images, the text
half is said.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moe_conformance.model.families.bounds import MOST_ROWS, MOST_SHARED, MOST_WIDTH
from moe_conformance.model.families.families import name_of
from moe_conformance.model.families.fields import (
    ACTIVATIONS,
    ALWAYS,
    BIASED,
    CHOSEN,
    FLOAT32,
    INPUT,
    SIGMOID,
    SIGMOID_EPS,
    SOFTMAX_PAIRS,
    SWIGLU_OAI,
    Method,
    activation,
    bias,
    clamped,
    count,
    dense_width,
    epsilon,
    flag,
    gemma4_width,
    groups,
    is_hashed,
    limits,
    noaux,
    norm,
    norm_eps,
    output_scale,
    scale,
    score,
    top_k,
)
from moe_conformance.model.families.keys import WHAT, Key, keys_in

KIMI = norm(True, "moe_renormalize", "norm_topk_prob")
GEMMA4 = Method(
    {**ALWAYS, "per_expert_scale": True},
    {"kind": "gemma4", **norm_eps(1e-6)},
    activation("hidden_activation", "gelu_pytorch_tanh"),
    dense=norm_eps(1e-6),
    dense_mlp={**activation("hidden_activation", "gelu_pytorch_tanh"), "width": dense_width},
)
DEEPSEEK_V2 = Method(
    Key(
        "topk_method",
        "greedy",
        {
            "greedy": scale(1.0),
            "group_limited_greedy": {**groups(None, None), "group_mask": 0.0, **scale(1.0)},
        },
    ),
    FLOAT32,
    shared_mlp=bias(),
)
ERNIE = Method({**BIASED, **ALWAYS, "floor": Key("moe_norm_min", 1e-12)}, FLOAT32, shared_mlp=bias("use_bias"))
QWEN = Method(norm(False))
QWEN_GATED = Method(norm(False), shared={"gate": True})
QWEN_GATED_NORM = Method(norm(True), shared={"gate": True})
TOPK_SOFTMAX = Method(CHOSEN)
SOFTMAX_NORM = Method(ALWAYS)

METHODS: dict[str, Method] = {
    "afmoe": Method({**SIGMOID_EPS, **scale(1.0, "route_scale")}),
    "aria_text": Method({**CHOSEN, **INPUT}, experts={}, shared_mlp={**activation(), **bias()}),
    "axk1": Method(noaux(2.5, 8, 4), FLOAT32, layer={"output_norm": epsilon("rms_norm_eps", 1e-6)}),
    "axk2": Method({**noaux(2.5), **groups(None, None), "group_mask": 0.0}, FLOAT32),
    "bailing_hybrid": Method({**noaux(2.5), **KIMI, **groups(8, 4, "num_expert_group", "n_group")}, FLOAT32),
    "beam": Method(
        {**noaux(2.5, 8, 4), "scale": 1.0}, FLOAT32, {**activation(), "dtype": "float32"}, layer=output_scale(2.5)
    ),
    "cohere2_moe": Method(
        Key(
            "expert_selection_fn",
            "softmax",
            {"softmax": CHOSEN, "sigmoid": {**CHOSEN, "score": "sigmoid", **INPUT, **norm(True)}},
        ),
        shared={
            "combine": Key("shared_expert_combination_strategy", "average", {"sum": "sum", "average": "average"}),
        },
    ),
    "dbrx": Method(
        {
            **INPUT,
            "renormalize": Key("moe_normalize_expert_weights", 1.0, lambda p: "no" if p is None else "norm"),
            "norm_order": Key("moe_normalize_expert_weights", 1.0, lambda p: 1.0 if p is None else p),
        },
        experts={
            "activation": lambda scope, layer: Key("name", "silu", ACTIVATIONS).read(
                scope.below(WHAT, "ffn_act_fn"), layer
            )
        },
    ),
    "deepseek_ocr2_text": DEEPSEEK_V2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": Method(noaux(2.5, 8, 4), FLOAT32),
    "deepseek_v32": Method(noaux(2.5, 8, 4), FLOAT32),
    "deepseek_v4": Method(
        {
            **ALWAYS,
            **score("sqrtsoftplus"),
            **INPUT,
            "selector": lambda scope, layer: "table" if is_hashed(scope, layer) else "topk",
            "selection_bias": lambda scope, layer: not is_hashed(scope, layer),
            "epsilon": 1e-20,
            **scale(1.5),
        },
        experts={**activation(), **clamped(10.0)},
        shared_mlp=bias(),
        layer={
            "vocab_size": lambda scope, layer: (
                count("vocab_size", 129280, 1, MOST_ROWS) if is_hashed(scope, layer) else 0
            )
        },
    ),
    "diffusion_gemma_text": GEMMA4,
    # An expert is one neuron: a row of the down table for its input, one of the up table for its output.
    "doge": Method(
        {**CHOSEN, **INPUT, "selector": "product_keys", **norm(False)},
        experts={**activation(), "gated": False, "weight_on": "w2_input"},
        dense={},
        dense_mlp={**activation(), **bias(), "width": dense_width},
    ),
    "dots1": Method(noaux(1.0, normed=False), FLOAT32),
    "dots3_note_text": Method(noaux(1.0), FLOAT32),
    "dots3_note_vision_encoder": Method(
        {**SIGMOID_EPS, **scale(1.0, "router_scaling_factor", "router_scale")}, FLOAT32
    ),
    "ernie4_5_moe": ERNIE,
    "ernie4_5_vl_moe_text": ERNIE,
    "exaone_moe": Method(noaux(2.5), FLOAT32),
    "flex_olmo": QWEN,
    "flint": Method({"score": "sigmoid", **norm(True)}, FLOAT32),
    "gemma4_text": replace(GEMMA4, dense_mlp={**GEMMA4.dense_mlp, "width": gemma4_width}),
    "glm4_moe": Method(noaux(1.0), FLOAT32),
    "glm4_moe_lite": Method(noaux(1.8), FLOAT32),
    "glm4v_moe_text": Method(noaux(1.0), FLOAT32),
    "glm5_next_text": Method(noaux(2.5), FLOAT32, clamped(10.0), shared_mlp=activation()),
    "glm_moe_dsa": Method(noaux(2.5), FLOAT32),
    "gpt_oss": Method({**CHOSEN, **INPUT}, {"bias": True}, {**SWIGLU_OAI, "bias": True}),
    "granitemoe": TOPK_SOFTMAX,
    "granitemoe_swa": TOPK_SOFTMAX,
    "granitemoehybrid": TOPK_SOFTMAX,
    "granitemoeshared": TOPK_SOFTMAX,
    "hunyuan_v1_moe": SOFTMAX_NORM,
    "hy_v3": Method(
        {**SIGMOID_EPS, **scale(2.826, "router_scaling_factor")},
        FLOAT32,
        shared_mlp=bias(),
        layer={"combine_dtype": flag("enable_moe_fp32_combine", True, "float32", "input")},
    ),
    "hy_v4": Method(
        noaux(2.827), FLOAT32, clamped(10.0), shared_mlp={**activation(), "clamp": "no", "limit": math.inf}
    ),
    "inkling2_text": Method(
        {**SIGMOID_EPS, **score("sigmoid"), **scale(8.0, "route_scale", "routed_scaling_factor")},
        FLOAT32,
        {
            **FLOAT32,
            "clamp": "tanh",
            "limit": Key("mlp_gate_softcap", 4.0, most=math.inf),
            "up_limit": Key("mlp_up_softcap", 25.0, most=math.inf),
        },
    ),
    "inkling_text": Method(
        {
            "score": "sigmoid",
            **BIASED,
            **scale(8.0, "route_scale"),
            "global_scale": True,
            "shared_classes": count("n_shared_experts", 2, 0, MOST_SHARED),
        },
        FLOAT32,
        shared={"weighted": True},
        shared_mlp={"weight_on": "w2_input"},
    ),
    "jamba": Method(),
    "jetmoe": Method(CHOSEN, experts=activation("activation_function"), layer={"output_bias": True}),
    "kimi_linear": Method({**noaux(2.446), **KIMI, **groups(1, 1, "num_expert_group", "n_group")}, FLOAT32),
    "kolibri1": Method({**CHOSEN, "score": "sigmoid", **BIASED, **norm(False)}, FLOAT32),
    "laguna": Method(
        {**SIGMOID, "logit_softcap": Key("moe_router_logit_softcapping", 0.0)},
        layer=output_scale(1.0, "moe_routed_scaling_factor"),
    ),
    "lfm2_moe": Method(
        {
            "score": "sigmoid",
            **INPUT,
            "selection_bias": flag("use_expert_bias", True),
            **norm(True),
            "epsilon": 1e-6,
            **scale(1.0),
        },
        experts={},
    ),
    "llama4_text": Method({**CHOSEN, "score": "sigmoid"}, experts={**activation(), "weight_on": "input"}),
    "longcat_flash": Method({**BIASED, **scale(6.0)}, FLOAT32),
    "mellum": Method(norm(True)),
    "mimo_v2_flash": Method(noaux(1.0), FLOAT32),
    "minimax": SOFTMAX_NORM,
    "minimax_m2": Method(SIGMOID),
    "minimax_m3_vl_text": Method(SIGMOID, experts=SWIGLU_OAI, layer=output_scale(2.0)),
    "mistral4": Method({**SOFTMAX_PAIRS, **norm(True), **INPUT}),
    "mistral_large4_text": Method({**SOFTMAX_PAIRS, **ALWAYS}, FLOAT32),
    "mixtral": SOFTMAX_NORM,
    "muse_spark_text": Method(
        {**SIGMOID, "epsilon": 1e-15, "logit_scale": Key("output_multiplier", 0.1767766952966369), **scale(1.0)},
        FLOAT32,
        {**activation(), "output_norm": epsilon("post_norm_eps", 1e-8)},
        latent=norm_eps(1e-5),
    ),
    "nemotron_h": Method(
        noaux(1.0),
        FLOAT32,
        {**activation("mlp_hidden_act", "relu2"), "gated": False},
        shared_mlp=bias(),
        latent=bias(),
    ),
    # Scores of a float32 softmax, rounded to the model's dtype before they are normalised; switch_transformers the
    # same, before it chooses. The floor is the epsilon of float32. In evaluation, too, outputs shrink by the share that
    # training drops.
    "nllb-moe": Method(
        Key(
            "second_expert_policy",
            "all",
            {
                "all": {
                    **ALWAYS,
                    **INPUT,
                    "floor": 2.0**-23,
                    "capacity": {
                        "per": "batch",
                        "tokens": Key("expert_capacity", 64, lambda tokens: tokens, least=0, whole=True),
                        "fraction": Key("moe_eval_capacity_token_fraction", 1.0),
                        "renormalize_before": flag("normalize_router_prob_before_dropping", False),
                        "by_weight": flag("batch_prioritized_routing", False),
                    },
                }
            },
        ),
        {**bias("router_bias"), "dtype": Key("router_dtype", "float32", {"float32": "float32"})},
        {**activation("activation_function", "relu"), "gated": False, "bias": True},
        layer={"output_scale": Key("moe_token_dropout", 0.2, lambda dropped: 1 - (dropped or 0), least=0, most=1)},
    ),
    "olmoe": QWEN,
    # Weights are divided by K, and the output is multiplied by it.
    "openai_privacy_filter": Method(
        {**CHOSEN, "scale": lambda scope, layer: 1 / top_k(scope, layer)},
        {**FLOAT32, "bias": True},
        {**SWIGLU_OAI, **FLOAT32, "bias": True},
        layer={"output_scale": top_k},
    ),
    "phimoe": Method({**CHOSEN, **INPUT, "selector": "sparsemixer", "jitter": Key("router_jitter_noise", 0.01)}),
    "qwen2_moe": QWEN_GATED,
    "qwen3_5_moe_text": Method(ALWAYS, shared={"gate": True}),
    "qwen3_moe": QWEN,
    "qwen3_next": QWEN_GATED_NORM,
    "qwen3_omni_moe_talker_text": QWEN_GATED,
    "qwen3_omni_moe_text": Method(norm(True)),
    "qwen3_vl_moe_text": SOFTMAX_NORM,
    "qwen4_exp_text": QWEN_GATED_NORM,
    "solar_open": Method(noaux(1.0), FLOAT32),
    "step3p5": Method(
        SIGMOID,
        experts={**activation(), **limits("swiglu_limits")},
        shared_mlp={**limits("swiglu_limits_shared"), **bias()},
        layer=output_scale(1.0, "moe_router_scaling_factor"),
    ),
    "switch_transformers": Method(
        {**INPUT, "capacity": {"tokens": count("expert_capacity", 64, 0, MOST_ROWS)}},
        {**bias("router_bias"), "dtype": Key("router_dtype", "float32", {"float32": "float32"})},
        {**activation("dense_act_fn", "relu"), "gated": False},
    ),
    "unlimited_ocr_text": DEEPSEEK_V2,
    "vitpose_backbone": Method(unsaid="the data set of a sample, not a router, chooses its expert"),
    # A router of three layers; its first is added to that of the layer before. One class more than experts: skip.
    "zaya": Method(
        {**BIASED, **INPUT, "skip_expert": True},
        {
            "kind": "zaya",
            "width": count("router_hidden_size", 256, 1, MOST_WIDTH),
            **norm_eps(1e-5),
            "takes_state": lambda scope, layer: layer > 0,
        },
    ),
}

# Keys that a config carries and the MoE layers of its model do not read, or in training alone (noise).
DEAD: dict[str, tuple[str, ...]] = {
    "dbrx": ("moe_jitter_eps",),
    "deepseek_v2": ("norm_topk_prob",),
    "deepseek_v32": ("mlp_bias",),
    "deepseek_v4": ("norm_topk_prob", "n_shared_experts", "router_jitter_noise"),
    "dots3_note_text": ("mlp_bias",),
    "glm_moe_dsa": ("mlp_bias",),
    "gpt_oss": ("hidden_act",),
    "inkling2_text": ("hidden_act",),
    "inkling_text": ("shared_expert_sink", "rms_norm_eps_moe_gate"),
    "laguna": ("moe_apply_router_weight_on_input",),
    "llama4_text": ("router_jitter_noise",),
    "minimax": ("router_jitter_noise",),
    "minimax_m2": ("router_jitter_noise",),
    "minimax_m3_vl_text": ("hidden_act", "router_jitter_noise"),
    "mixtral": ("router_jitter_noise",),
    "nemotron_h": ("n_shared_experts", "moe_shared_expert_overlap", "use_bias"),
    "phimoe": ("num_experts_per_tok", "input_jitter_noise"),
    "qwen3_omni_moe_talker_text": ("decoder_sparse_step", "mlp_only_layers"),
    "switch_transformers": ("add_router_probs", "router_jitter_noise"),
}


def method_keys(family: str) -> tuple[tuple[str, ...], ...]:
    """The names of each key that decides the method of a family's layers; sizes and rules of layers apart."""
    found = [key.names for part in vars(METHODS[family]).values() for key in keys_in(part)]
    return tuple(dict.fromkeys(found))


def dead_keys(model_type: str) -> tuple[str, ...]:
    """Keys that a config of this model type carries though its MoE layers never read them: they change nothing."""
    return DEAD.get(name_of(model_type), ())
