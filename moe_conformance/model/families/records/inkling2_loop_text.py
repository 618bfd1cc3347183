from __future__ import annotations

import math

from moe_conformance.model.families.configs import HIDDEN, LIMIT, MODEL, MOE_WIDTH, N_ROUTED, SCALE
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import looped
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, Names, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import FLOAT32, SIGMOID_EPS, scale, score

RECORD = Record(
    model_type="inkling2_loop_text",
    config_class="Inkling2LoopTextConfig",
    wrapper=Wrapper("Inkling2LoopConfig", {"vision_config": {"text_hidden_size": HIDDEN}}),
    sizes=Sizes(runs=looped),
    method=Method(
        {**SIGMOID_EPS, **score("sigmoid"), **scale(8.0, "route_scale", "routed_scaling_factor")},
        FLOAT32,
        {
            **FLOAT32,
            "clamp": "tanh",
            "limit": Key("mlp_gate_softcap", 4.0, most=math.inf),
            "up_limit": Key("mlp_up_softcap", 25.0, most=math.inf),
        },
    ),
    dead=("hidden_act",),
    names=Names(
        one("mlp.experts.w13_weight", "experts.w13", "interleaved")
        + one("mlp.experts.w2_weight", "experts.w2")
        + ROUTER
        + one("mlp.gate.bias", "router.selection_bias"),
        PACKED + BIAS,
        prefix="model.llm.",
    ),
    config=MODEL
    | N_ROUTED
    | MOE_WIDTH
    | {"n_layers_per_attn_res_block": 3, "loop_layer_index_start": 3, "loop_layer_index_end": 6, "loop_num_passes": 4},
    ways=(
        {
            "route_scale": 3.5,
            "scoring_func": "sqrtsoftplus",
            "mlp_gate_softcap": 3.0,
            "mlp_up_softcap": 9.0,
            "hidden_act": "gelu",
        },
    ),
    # The layer judged is one of those that run more than once.
    block=Block(
        {
            "route_scale": SCALE,
            "mlp_gate_softcap": LIMIT,
            "mlp_up_softcap": LIMIT,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
        }
    ),
    configs=(
        Config(
            "hub",
            keys={"loop_config": {"core_start": 3, "core_end": 6, "num_passes": 4}},
            dropped=("loop_layer_index_start", "loop_layer_index_end", "loop_num_passes"),
            form="plain",
            model_type="inkling2_loop",
            top={"vision_config": {"text_hidden_size": 40}},
        ),
    ),
    captured=("",),
    tiny=Tiny(
        "Inkling2LoopForConditionalGeneration",
        text_class="Inkling2LoopForCausalLM",
        keys={
            "text_config.n_layers_per_attn_res_block": 1,
            "text_config.loop_layer_index_start": 1,
            "text_config.loop_layer_index_end": 2,
        },
    ),
)
