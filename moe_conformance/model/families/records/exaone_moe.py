from __future__ import annotations

from moe_conformance.model.families.configs import (
    KNOBS,
    MODEL,
    NOAUX,
    NOAUX_TC,
    NUM_EXPERTS,
    NUM_SHARED,
    OWN_WIDTH,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="exaone_moe",
    config_class="ExaoneMoeConfig",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1, "first_k_dense_replace"))),
    method=Method(noaux(2.5), FLOAT32),
    names=Names(
        EACH + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias") + SHARED_EXPERTS, PACKED + BIAS
    ),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | TYPES | NUM_SHARED,
    beside=NOAUX_TC,
    ways=(NOAUX[0] | {"num_experts": 12}, NOAUX[1] | {"num_experts": 12}),
    block=Block(KNOBS),
    tiny=Tiny("ExaoneMoeForCausalLM"),
    authority=(
        "transformers, whose class has no swiglu_limits; engines read them, and a config that sets them is not judged"
    ),
)
