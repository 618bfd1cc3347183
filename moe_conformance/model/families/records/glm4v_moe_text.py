from __future__ import annotations

from moe_conformance.model.families.configs import FIRST_K, KNOBS, MODEL, N_ROUTED, N_SHARED, NOAUX, OWN_WIDTH
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="glm4v_moe_text",
    also=("Glm4vMoe_text",),
    config_class="Glm4vMoeTextConfig",
    wrapper=Wrapper("Glm4vMoeConfig"),
    sizes=Sizes(shared=COUNTED, layers=leading_dense(1, "first_k_dense_replace")),
    method=Method(noaux(1.0), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED, prefixes={"glm4v_moe": "model.language_model."}),
    config=MODEL | N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED,
    ways=NOAUX,
    block=Block(KNOBS),
    tiny=Tiny(
        "Glm4vMoeForConditionalGeneration",
        keys={
            "text_config.rope_parameters": {
                **{"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
                "partial_rotary_factor": 1.0,
            }
        },
    ),
)
