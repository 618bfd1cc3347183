from __future__ import annotations

from moe_conformance.model.families.bounds import MOST_SHARED
from moe_conformance.model.families.configs import GELU, MODEL, N_ROUTED, N_SHARED, OWN_WIDTH, SCALE, TYPES
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, Names, Piece, one
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import BIASED, FLOAT32, count, scale

RECORD = Record(
    model_type="inkling_text",
    also=("inkling_mm_model",),
    config_class="InklingTextConfig",
    wrapper=Wrapper("InklingConfig"),
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(0, "dense_mlp_idx"))),
    method=Method(
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
    dead=("shared_expert_sink", "rms_norm_eps_moe_gate"),
    names=Names(
        one("mlp.experts.w13_weight", "experts.w13", "interleaved")
        + one("mlp.experts.w2_weight", "experts.w2")
        + ROUTER
        + one("mlp.gate.bias", "router.selection_bias")
        + one("mlp.gate.global_scale", "router.global_scale")
        + one("mlp.shared_experts.shared_w13_weight", "shared.w13", "apart_interleaved")
        + one("mlp.shared_experts.shared_w2_weight", "shared.w2", "apart_columns"),
        PACKED
        + BIAS
        + (
            Piece("mlp.shared_experts.gate_proj", "shared.w13", half=0, ops=("apart",)),
            Piece("mlp.shared_experts.up_proj", "shared.w13", half=1, ops=("apart",)),
            Piece("mlp.shared_experts.down_proj", "shared.w2", ops=("apart_columns",)),
        ),
        prefixes={"inkling_mm_model": "model.llm."},
        alone_as_modules=True,
    ),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    ways=({"route_scale": 3.5, "shared_expert_sink": False, "n_shared_experts": 3} | GELU,),
    block=Block({"route_scale": SCALE}),
    configs=(Config("hub", keys={"dense_mlp_idx": 4}, dropped=("mlp_layer_types",), form="plain"),),
    # As many layers as the vision tower has foldings; with fewer it wants scipy.
    tiny=Tiny("InklingForConditionalGeneration", text_class="InklingForCausalLM", keys={"vision_config.n_layers": 6}),
    sample="core",
)
