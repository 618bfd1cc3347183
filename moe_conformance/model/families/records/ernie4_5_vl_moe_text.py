from __future__ import annotations

from moe_conformance.model.families.configs import GELU, LATENT, MODEL, MOE_K, MOE_SHARED, OWN_WIDTH, TYPES, WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import EACH, SHARED_EXPERTS, Names, Piece, of_vision, one, packed, second
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import ALWAYS, BIASED, FLOAT32, bias

_MODULES = (
    packed("mlp.text_moe.experts")
    + one("mlp.text_moe.gate.weight", "router.proj")
    + one("mlp.text_moe.gate.moe_statics.e_score_correction_bias", "router.selection_bias", "row")
)

RECORD = Record(
    model_type="ernie4_5_vl_moe_text",
    slug="ernie4-5-vl",
    config_class="Ernie4_5_VLMoeTextConfig",
    wrapper=Wrapper("Ernie4_5_VLMoeConfig"),
    # Text and vision experts in one layer: the text ones are described.
    sizes=Sizes(
        shared=COUNTED,
        layers=typed(leading_dense(1)),
        width_entry=0,
        nulls={"moe_intermediate_size": ("", [1536, 512])},
    ),
    method=Method({**BIASED, **ALWAYS, "floor": Key("moe_norm_min", 1e-12)}, FLOAT32, shared_mlp=bias("use_bias")),
    names=Names(
        EACH
        + second(EACH)
        + one("mlp.gate.weight", "router.proj", "transposed")
        + one("mlp.gate.weight_1", "vision.router.proj", "transposed")
        + tuple(
            Piece("mlp.moe_statics.e_score_correction_bias", target, ops=("row",), row=row, rows=2)
            for row, target in enumerate(("router.selection_bias", "vision.router.selection_bias"))
        )
        + SHARED_EXPERTS,
        _MODULES + of_vision(_MODULES),
        second_width="moe_intermediate_size",
    ),
    config=MODEL
    | MOE_K
    | OWN_WIDTH
    | TYPES
    | MOE_SHARED
    | {
        "moe_intermediate_size": [WIDTH, LATENT],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    ways=({"moe_norm_min": 0.125, "use_bias": True} | GELU,),
    # Heads of 8: the sections of its rotary embedding fit no wider ones.
    block=Block({"moe_norm_min": 0.9375, "num_attention_heads": 12, "num_key_value_heads": 12}),
    tiny=Tiny(
        "Ernie4_5_VLMoeForConditionalGeneration",
        keys={
            "text_config.moe_intermediate_size": [WIDTH, 12],
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
            "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    ),
)
