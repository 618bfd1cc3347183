from __future__ import annotations

import math

from moe_conformance.model.families.configs import GELU, HIDDEN, LIMIT, MODEL, MOE_WIDTH, N_ROUTED, SCALE
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, Names, one
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import FLOAT32, SIGMOID_EPS, scale, score

RECORD = Record(
    model_type="inkling2_text",
    config_class="Inkling2TextConfig",
    wrapper=Wrapper("Inkling2Config", {"vision_config": {"text_hidden_size": HIDDEN}}),
    sizes=Sizes(),
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
    config=MODEL | N_ROUTED | MOE_WIDTH,
    ways=({"route_scale": 3.5, "scoring_func": "sqrtsoftplus", "mlp_gate_softcap": 3.0, "mlp_up_softcap": 9.0} | GELU,),
    block=Block({"route_scale": SCALE, "mlp_gate_softcap": LIMIT, "mlp_up_softcap": LIMIT}),
    variants={"one-cap": Variant({"mlp_up_softcap": 2.25})},
    tiny=Tiny("Inkling2ForConditionalGeneration", text_class="Inkling2ForCausalLM"),
)
