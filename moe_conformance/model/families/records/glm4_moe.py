from __future__ import annotations

from moe_conformance.model.families.configs import FIRST_K, KNOBS, MODEL, N_ROUTED, N_SHARED, NOAUX, OWN_WIDTH
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="glm4_moe",
    config_class="Glm4MoeConfig",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(1, "first_k_dense_replace")),
    method=Method(noaux(1.0), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED,
    ways=NOAUX,
    block=Block(KNOBS),
    tiny=Tiny("Glm4MoeForCausalLM"),
)
