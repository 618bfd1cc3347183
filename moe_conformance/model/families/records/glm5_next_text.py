from __future__ import annotations

from moe_conformance.model.families.configs import (
    KNOBS,
    LIMIT,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NOAUX,
    NOAUX_TC,
    OWN_WIDTH,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import FLOAT32, activation, clamped, noaux

RECORD = Record(
    model_type="glm5_next_text",
    config_class="Glm5NextTextConfig",
    wrapper=Wrapper("Glm5NextConfig"),
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(3))),
    method=Method(noaux(2.5), FLOAT32, clamped(10.0), shared_mlp=activation()),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED, prefixes={"glm5_next": "model.language_model."}),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    beside=NOAUX_TC,
    ways=(NOAUX[0] | {"swiglu_limit": 6.5}, NOAUX[1] | {"swiglu_limit": 2.5}),
    block=Block(KNOBS | {"swiglu_limit": LIMIT}),
    variants={"gelu": Variant({"hidden_act": "gelu"})},
    tiny=Tiny(
        "Glm5NextForConditionalGeneration",
        keys={
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
            "text_config.index_kpool": 4,
            "text_config.qk_rope_head_dim": 0,
        },
    ),
)
