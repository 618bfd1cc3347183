from __future__ import annotations

from moe_conformance.model.families.configs import (
    DENSE,
    LIMIT,
    MODEL,
    NUM_LOCAL,
    PLAIN_WIDTH,
    RESCALED,
    SCALED,
    SWIGLU,
    TYPES,
    WIDE_SHARED,
    WIDTH,
)
from moe_conformance.model.families.layers import flagged, typed
from moe_conformance.model.families.naming import BIAS, BLOCK_SPARSE, PACKED, ROUTER, Names, one, shared
from moe_conformance.model.families.record import (
    DENSE_WIDTH,
    Block,
    Config,
    Method,
    Record,
    Shared,
    Sizes,
    Tiny,
    Variant,
    Wrapper,
)
from moe_conformance.model.families.words import SIGMOID, SWIGLU_OAI, output_scale

RECORD = Record(
    model_type="minimax_m3_vl_text",
    config_class="MiniMaxM3VLTextConfig",
    wrapper=Wrapper("MiniMaxM3VLConfig"),
    sizes=Sizes(width=DENSE_WIDTH, shared=Shared(1, ("shared_intermediate_size",)), layers=typed(flagged)),
    method=Method(SIGMOID, experts=SWIGLU_OAI, layer=output_scale(2.0)),
    dead=("hidden_act", "router_jitter_noise"),
    names=Names(
        BLOCK_SPARSE
        + one("block_sparse_moe.e_score_correction_bias", "router.selection_bias")
        + shared("block_sparse_moe.shared_experts"),
        PACKED
        + ROUTER
        + BIAS
        + one("mlp.shared_experts.gate_up_proj.weight", "shared.w13")
        + one("mlp.shared_experts.down_proj.weight", "shared.w2"),
        prefixes={"minimax_m3_vl": "language_model.model."},
        alone_as_modules=True,
    ),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | TYPES | WIDE_SHARED | {"dense_intermediate_size": DENSE},
    beside={"scoring_func": "sigmoid", "use_routing_bias": True},
    ways=(SWIGLU | RESCALED | {"router_jitter_noise": 0.5},),
    # As wide as a routed expert, as in every published config.
    block=Block(SCALED | {"swiglu_alpha": 1.5, "swiglu_limit": LIMIT, "shared_intermediate_size": WIDTH}),
    variants={
        "narrow-shared": Variant(
            {"shared_intermediate_size": 40}, lenient="every published config has shared experts as wide as routed ones"
        )
    },
    configs=(
        Config(
            "hub",
            keys={"moe_layer_freq": [0, 1, 0, 0, 1, 1, 1, 0, 1]},
            dropped=("mlp_layer_types",),
            form="plain",
            model_type="minimax_m3_vl",
        ),
    ),
    tiny=Tiny(
        "MiniMaxM3SparseForConditionalGeneration",
        text_class="MiniMaxM3VLForCausalLM",
        keys={"projector_hidden_size": 32, "merged_hidden_size": 32},
    ),
)
