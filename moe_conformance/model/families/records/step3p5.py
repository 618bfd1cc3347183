from __future__ import annotations

from moe_conformance.model.families.configs import (
    EXPERTS,
    GELU,
    MLP_BIAS,
    MODEL,
    OWN_WIDTH,
    SCALE,
    SHARED,
    TOP_K,
    TYPES,
)
from moe_conformance.model.families.layers import enumerated, typed
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, SHARED_EXPERTS, Names, Piece, shared
from moe_conformance.model.families.record import Block, Config, Method, Record, Shared, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import SIGMOID, activation, bias, limits, output_scale

RECORD = Record(
    model_type="step3p5",
    also=("step3p7",),
    slug="step3p7",
    config_class="Step3p7TextConfig",
    wrapper=Wrapper("Step3p7Config"),
    sizes=Sizes(layers=typed(enumerated), shared=Shared(1, ("share_expert_dim", "share_expert_dims"))),
    method=Method(
        SIGMOID,
        experts={**activation(), **limits("swiglu_limits")},
        shared_mlp={**limits("swiglu_limits_shared"), **bias()},
        layer=output_scale(1.0, "moe_router_scaling_factor"),
    ),
    names=Names(
        (
            Piece("moe.gate_proj.weight", "experts.w13", half=0),
            Piece("moe.up_proj.weight", "experts.w13", half=1),
            Piece("moe.down_proj.weight", "experts.w2"),
            Piece("moe.gate.weight", "router.proj"),
            Piece("moe.router_bias", "router.selection_bias"),
            *shared("share_expert"),
        ),
        PACKED + ROUTER + BIAS + SHARED_EXPERTS,
    ),
    config=MODEL | {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K} | OWN_WIDTH | TYPES | {"share_expert_dim": SHARED},
    # No clamp in layer 4, written as null, nor in layer 6, as 0.
    ways=(
        {
            "moe_router_scaling_factor": 3.5,
            "swiglu_limits": [None, 1.5, 2.5, None, None, 3.5, 0.0, None, 4.5],
            "swiglu_limits_shared": [None, 5.5, None, None, 6.5, 0, None, None, 7.5],
        }
        | MLP_BIAS
        | GELU,
        {"swiglu_limits": None},
    ),
    block=Block(
        {"moe_router_scaling_factor": SCALE, "swiglu_limits": [0.0, 0.75], "swiglu_limits_shared": [0.0, 1.5]},
        grouped=False,
    ),
    variants={"no-limit": Variant({"swiglu_limits": None, "swiglu_limits_shared": None})},
    configs=(
        Config(
            "hub", keys={"moe_layers_enum": "2,4,7"}, dropped=("mlp_layer_types",), form="plain", model_type="step3p7"
        ),
        Config(
            "hub-list",
            keys={"moe_layers_enum": [2, 4, 7]},
            dropped=("mlp_layer_types",),
            form="plain",
            model_type="step3p7",
        ),
        Config(
            "draft",
            kind="layers",
            keys={"swiglu_limits": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.5, 5.5], "num_nextn_predict_layers": 1},
            form="plain",
        ),
    ),
    tiny=Tiny("Step3p7ForConditionalGeneration", keys={"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}),
)
