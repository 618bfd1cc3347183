"""What the classes of each model type compute, and the config keys that decide it: one row a family.

Only as many rows as there are different routers, experts and layers; `block` judges every family by its own config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_conformance.engine import (
    Capacity,
    DenseSpec,
    LatentSpec,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    RoutingSpec,
    SharedSpec,
)

Keys = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """layer: what the model type's layer computes, fields that a key decides at their defaults, sizes at 0.

    keys: such a field, dotted below LayerSpec -> config key, dotted where it is nested; "" where no key is needed,
    for the module is built by itself. always: further keys. lone_router: the router alone routes, given hidden states;
    elsewhere the block has a hand in it. bare: router and experts alone, without what the decoder layer has around.
    """

    model_type: str
    layer: LayerSpec
    keys: Keys
    always: Mapping[str, Any] = field(default_factory=dict)
    lone_router: bool = True
    bare: bool = False


_NUM: Keys = {"num_experts": "num_experts", "routing.top_k": "num_experts_per_tok"}
_LOCAL: Keys = {"num_experts": "num_local_experts", "routing.top_k": "num_experts_per_tok"}
_ROUTED: Keys = {"num_experts": "n_routed_experts", "routing.top_k": "num_experts_per_tok"}
_HIDDEN: Keys = {"hidden_size": "hidden_size"}
_OWN: Keys = {**_HIDDEN, "experts.width": "moe_intermediate_size", "experts.activation": "hidden_act"}
_PLAIN: Keys = {**_HIDDEN, "experts.width": "intermediate_size", "experts.activation": "hidden_act"}
_BUILT: Keys = {"shared.mlp.width": "", "shared.mlp.activation": ""}
_NORM: Keys = {"routing.renormalize": "norm_topk_prob"}
_SCALE: Keys = {"routing.scale": "routed_scaling_factor"}
_GROUPS: Keys = {"routing.groups": "n_group", "routing.top_groups": "topk_group"}
_DEEPSEEK: Keys = {**_ROUTED, **_OWN, **_SCALE, **_BUILT}
_NOAUX_KEYS: Keys = {**_DEEPSEEK, **_NORM, **_GROUPS}
_OAI_KEYS: Keys = {**_HIDDEN, "experts.width": "intermediate_size", "experts.limit": "swiglu_limit"}
_GEMMA4_KEYS: Keys = {
    **_OWN,
    "num_experts": "num_experts",
    "routing.top_k": "top_k_experts",
    "experts.activation": "hidden_activation",
}
_NEMOTRON_KEYS: Keys = {
    **_NOAUX_KEYS,
    "experts.activation": "mlp_hidden_act",
    "shared.mlp.activation": "mlp_hidden_act",
    "shared.mlp.width": "moe_shared_expert_intermediate_size",
}

_SPARSE = {"mlp_layer_types": ["sparse"]}
_FIRST = {"first_k_dense_replace": 0}
_ONE = {"n_shared_experts": 1}
_GEMMA4_ALWAYS = {"enable_moe_block": True, "layer_types": ["full_attention"]}

_FLOAT32 = LogitsSpec(dtype="float32")
_GEMMA4 = RoutingSpec(0, renormalize="sum", per_expert_scale=True)
_CHOSEN = RoutingSpec(0, select_on="logits")
_BIASED = RoutingSpec(0, score="sigmoid", selection_bias=True, renormalize="sum")
_NOAUX = RoutingSpec(0, score="sigmoid", selection_bias=True, group_score="top2_sum", epsilon=1e-20)
_PAIRS = RoutingSpec(0, group_score="top2_sum", group_mask=0.0, epsilon=1e-20)
_V4 = RoutingSpec(0, score="sqrt_softplus", score_dtype="input", selection_bias=True, renormalize="sum", epsilon=1e-20)
_OAI = MLPSpec(0, clamp="before", alpha=1.702, up_offset=1.0)
_UNGATED = MLPSpec(0, gated=False)
_SHARED = SharedSpec(MLPSpec(0))


def _layer(routing: RoutingSpec, logits: LogitsSpec | None = None, **parts: Any) -> LayerSpec:
    return LayerSpec(
        hidden_size=0,
        num_experts=0,
        logits=logits or LogitsSpec(),
        routing=routing,
        **{"experts": MLPSpec(0), **parts},
    )


# Of several families that compute a spec the first is asked. First come those whose router returns float32 whatever
# the model's dtype is, and of these those without a shared expert.
FAMILIES = (
    Family("mixtral", _layer(RoutingSpec(0, renormalize="sum")), {**_LOCAL, **_PLAIN}),
    Family(
        "deepseek_v2",
        _layer(RoutingSpec(0), _FLOAT32, shared=_SHARED),
        _DEEPSEEK,
        {"topk_method": "greedy", **_FIRST, **_ONE},
    ),
    Family(
        "deepseek_v2",
        _layer(RoutingSpec(0, group_mask=0.0), _FLOAT32, shared=_SHARED),
        {**_DEEPSEEK, **_GROUPS},
        {"topk_method": "group_limited_greedy", **_FIRST, **_ONE},
    ),
    Family(
        "mistral_large4_text",
        _layer(replace(_PAIRS, renormalize="sum"), _FLOAT32, shared=_SHARED),
        {**_DEEPSEEK, **_GROUPS},
        {**_SPARSE, **_ONE},
    ),
    Family(
        "mistral4",
        _layer(replace(_PAIRS, score_dtype="input"), shared=_SHARED),
        _NOAUX_KEYS,
        {**_FIRST, **_ONE},
    ),
    Family(
        "gemma4_text",
        _layer(_GEMMA4, LogitsSpec("gemma4")),
        {**_GEMMA4_KEYS, "logits.norm_eps": "rms_norm_eps"},
        _GEMMA4_ALWAYS,
        bare=True,
    ),
    Family(
        "gemma4_text",
        _layer(_GEMMA4, LogitsSpec("gemma4"), dense=DenseSpec(MLPSpec(0), norm_eps=1e-6)),
        {
            **_GEMMA4_KEYS,
            "dense.mlp.width": "intermediate_size",
            "dense.mlp.activation": "hidden_activation",
            "dense.norm_eps": "rms_norm_eps",
        },
        _GEMMA4_ALWAYS,
    ),
    Family(
        "mimo_v2_flash", _layer(_NOAUX, _FLOAT32), {k: v for k, v in _NOAUX_KEYS.items() if k not in _BUILT}, _SPARSE
    ),
    Family("deepseek_v3", _layer(_NOAUX, _FLOAT32, shared=_SHARED), _NOAUX_KEYS, {**_FIRST, **_ONE}),
    Family("axk2", _layer(replace(_NOAUX, group_mask=0.0), _FLOAT32, shared=_SHARED), _NOAUX_KEYS, {**_SPARSE, **_ONE}),
    Family(
        "hy_v4",
        _layer(_NOAUX, _FLOAT32, experts=MLPSpec(0, clamp="before"), shared=_SHARED),
        {**_NOAUX_KEYS, "experts.limit": "swiglu_limit"},
        {**_SPARSE, **_ONE},
    ),
    Family(
        "nemotron_h",
        _layer(_NOAUX, _FLOAT32, experts=_UNGATED, shared=SharedSpec(_UNGATED)),
        _NEMOTRON_KEYS,
        {"hybrid_override_pattern": "E"},
    ),
    Family(
        "nemotron_h",
        _layer(_NOAUX, _FLOAT32, experts=_UNGATED, shared=SharedSpec(_UNGATED), latent=LatentSpec(0)),
        {**_NEMOTRON_KEYS, "latent.width": "moe_latent_size"},
        {"hybrid_override_pattern": "E"},
    ),
    Family("minimax_m2", _layer(_BIASED), {**_LOCAL, **_PLAIN}, lone_router=False),
    Family(
        "minimax_m3_vl_text",
        _layer(_BIASED, experts=_OAI, shared=SharedSpec(_OAI)),
        {
            **_LOCAL,
            **_OAI_KEYS,
            "experts.alpha": "swiglu_alpha",
            "shared.mlp.alpha": "swiglu_alpha",
            "shared.mlp.limit": "swiglu_limit",
            "shared.mlp.width": "shared_intermediate_size",
            "output_scale": "routed_scaling_factor",
        },
        _SPARSE,
    ),
    Family(
        "muse_spark_text",
        _layer(
            replace(_BIASED, epsilon=1e-15),
            _FLOAT32,
            experts=MLPSpec(0, output_norm=1e-8),
            latent=LatentSpec(0, norm_eps=1e-5),
        ),
        {
            **_LOCAL,
            **_OWN,
            **_SCALE,
            "routing.logit_scale": "output_multiplier",
            "experts.output_norm": "post_norm_eps",
            "latent.width": "moe_hidden_size",
            "latent.norm_eps": "rms_norm_eps",
        },
        _SPARSE,
    ),
    Family(
        "flint",
        _layer(RoutingSpec(0, score="sigmoid"), _FLOAT32, shared=_SHARED),
        {**_NUM, **_OWN, **_NORM, **_BUILT},
        {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family(
        "kolibri1",
        _layer(replace(_CHOSEN, score="sigmoid", selection_bias=True), _FLOAT32, shared=_SHARED),
        {**_NUM, **_OWN, **_NORM, **_BUILT},
    ),
    Family(
        "longcat_flash",
        _layer(RoutingSpec(0, selection_bias=True), _FLOAT32),
        {
            **_HIDDEN,
            **_SCALE,
            "num_experts": "n_routed_experts",
            "routing.top_k": "moe_topk",
            "routing.identity_experts": "zero_expert_num",
            "experts.width": "expert_ffn_hidden_size",
            "experts.activation": "hidden_act",
        },
        {"num_layers": 1, "num_hidden_layers": 2},
    ),
    Family(
        "ernie4_5_moe",
        _layer(RoutingSpec(0, selection_bias=True, renormalize="sum"), _FLOAT32, shared=_SHARED),
        {
            **_HIDDEN,
            **_BUILT,
            "num_experts": "moe_num_experts",
            "routing.top_k": "moe_k",
            "routing.floor": "moe_norm_min",
            "experts.width": "moe_intermediate_size",
            "experts.activation": "hidden_act",
        },
        {"moe_layer_start_index": 0, "moe_layer_end_index": 0, "moe_layer_interval": 1, "moe_num_shared_experts": 1},
    ),
    # Routers that return weights in the model's dtype.
    Family("qwen3_moe", _layer(RoutingSpec(0)), {**_NUM, **_OWN, **_NORM}),
    Family(
        "qwen2_moe",
        _layer(RoutingSpec(0), shared=replace(_SHARED, gate=True)),
        {**_NUM, **_OWN, **_NORM, **_BUILT},
    ),
    Family("granitemoe", _layer(_CHOSEN), {**_LOCAL, **_PLAIN}),
    Family(
        "gpt_oss",
        _layer(replace(_CHOSEN, score_dtype="input"), LogitsSpec(bias=True), experts=replace(_OAI, bias=True)),
        {**_LOCAL, **_OAI_KEYS, "experts.alpha": "swiglu_alpha"},
    ),
    Family(
        "cohere2_moe",
        _layer(replace(_CHOSEN, score="sigmoid", score_dtype="input"), shared=_SHARED),
        {**_NUM, **_PLAIN, **_NORM, **_BUILT, "shared.combine": "shared_expert_combination_strategy"},
        {"expert_selection_fn": "sigmoid", "num_shared_experts": 1, **_SPARSE},
    ),
    Family(
        "llama4_text",
        _layer(replace(_CHOSEN, score="sigmoid"), experts=MLPSpec(0, weight_on="input"), shared=_SHARED),
        {**_LOCAL, **_PLAIN, **_BUILT},
        {"interleave_moe_layer_step": 1},
        lone_router=False,
    ),
    Family(
        "deepseek_v4",
        _layer(_V4, experts=MLPSpec(0, clamp="before"), shared=SharedSpec(MLPSpec(0, clamp="before"))),
        {
            **_ROUTED,
            **_OWN,
            **_SCALE,
            "experts.limit": "swiglu_limit",
            "shared.mlp.limit": "swiglu_limit",
            "shared.mlp.width": "moe_intermediate_size",
            "shared.mlp.activation": "hidden_act",
        },
        {"mlp_layer_types": ["moe"]},
    ),
    Family(
        "deepseek_v4",
        _layer(
            replace(_V4, selection_bias=False, selector="table"),
            experts=MLPSpec(0, clamp="before"),
            shared=SharedSpec(MLPSpec(0, clamp="before")),
        ),
        {
            **_ROUTED,
            **_OWN,
            **_SCALE,
            "experts.limit": "swiglu_limit",
            "shared.mlp.limit": "swiglu_limit",
            "vocab_size": "vocab_size",
            "shared.mlp.width": "moe_intermediate_size",
            "shared.mlp.activation": "hidden_act",
        },
        {"mlp_layer_types": ["hash_moe"]},
        lone_router=False,
    ),
    Family(
        "lfm2_moe",
        _layer(RoutingSpec(0, score="sigmoid", score_dtype="input", epsilon=1e-6)),
        {**_NUM, **_OWN, **_NORM, **_SCALE, "routing.selection_bias": "use_expert_bias"},
        {"num_dense_layers": 0, "layer_types": ["full_attention"]},
        lone_router=False,
    ),
    Family(
        "laguna",
        _layer(_BIASED, shared=_SHARED),
        {
            **_NUM,
            **_OWN,
            **_BUILT,
            "routing.logit_softcap": "moe_router_logit_softcapping",
            "output_scale": "moe_routed_scaling_factor",
        },
        _SPARSE,
    ),
    Family(
        "dbrx",
        _layer(RoutingSpec(0, score_dtype="input", renormalize="norm")),
        {
            "hidden_size": "d_model",
            "num_experts": "ffn_config.moe_num_experts",
            "routing.top_k": "ffn_config.moe_top_k",
            "routing.norm_order": "ffn_config.moe_normalize_expert_weights",
            "experts.width": "ffn_config.ffn_hidden_size",
        },
        {"n_layers": 1, "n_heads": 1, "attn_config": {"rope_theta": 1e4}},
        lone_router=False,
    ),
    Family(
        "phimoe",
        _layer(RoutingSpec(2, score_dtype="input", selector="sparsemixer", select_on="logits")),
        {
            **_HIDDEN,
            "num_experts": "num_local_experts",
            "experts.width": "intermediate_size",
            "experts.activation": "hidden_act",
            "routing.jitter": "router_jitter_noise",
        },
    ),
    Family(
        "inkling_text",
        _layer(
            RoutingSpec(0, score="sigmoid", selection_bias=True, global_scale=True),
            _FLOAT32,
            shared=SharedSpec(MLPSpec(0, weight_on="w2_input"), weighted=True),
        ),
        {**_ROUTED, **_OWN, "routing.scale": "route_scale", "routing.shared_classes": "n_shared_experts"},
        _SPARSE,
    ),
    Family(
        "zaya",
        _layer(
            RoutingSpec(1, score_dtype="input", selection_bias=True, skip_expert=True),
            LogitsSpec("zaya", norm_eps=1e-5),
        ),
        {**_OWN, "num_experts": "num_experts", "logits.width": "router_hidden_size", "logits.norm_eps": "rms_norm_eps"},
    ),
    Family(
        "switch_transformers",
        _layer(RoutingSpec(1, score_dtype="input", capacity=Capacity(tokens=64)), _FLOAT32, experts=_UNGATED),
        {
            "hidden_size": "d_model",
            "num_experts": "num_experts",
            "experts.width": "d_ff",
            "experts.activation": "dense_act_fn",
            "routing.capacity.tokens": "expert_capacity",
            "logits.bias": "router_bias",
        },
        {
            "d_kv": 8,
            "num_heads": 1,
            "num_layers": 1,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_sparse_step": 1,
            "encoder_sparse_step": 1,
        },
        lone_router=False,
    ),
    # Experts that none of the above has.
    Family(
        "step3p5",
        _layer(_BIASED, experts=MLPSpec(0, clamp="after"), shared=_SHARED),
        {
            **_ROUTED,
            **_OWN,
            "experts.limit": "swiglu_limits",
            "shared.mlp.width": "share_expert_dim",
            "shared.mlp.activation": "hidden_act",
            "output_scale": "moe_router_scaling_factor",
        },
        _SPARSE,
    ),
    Family(
        "inkling2_text",
        _layer(replace(_BIASED, epsilon=1e-20), _FLOAT32, experts=MLPSpec(0, clamp="tanh", dtype="float32")),
        {
            **_ROUTED,
            **_HIDDEN,
            "experts.width": "moe_intermediate_size",
            "experts.limit": "mlp_gate_softcap",
            "experts.up_limit": "mlp_up_softcap",
            "routing.scale": "route_scale",
        },
    ),
    Family(
        "beam",
        _layer(_NOAUX, _FLOAT32, experts=MLPSpec(0, dtype="float32")),
        {**_NUM, **_OWN, **_NORM, **_GROUPS, "output_scale": "routed_scaling_factor"},
        _SPARSE,
    ),
    # Its router divides by K, and the block multiplies by it: no spec says that for every K.
    Family(
        "openai_privacy_filter",
        _layer(
            replace(_CHOSEN, scale=math.nan),
            LogitsSpec(bias=True, dtype="float32"),
            experts=replace(_OAI, bias=True, dtype="float32"),
        ),
        {**_LOCAL, **_OAI_KEYS, "experts.alpha": "swiglu_alpha"},
        lone_router=False,
    ),
)
