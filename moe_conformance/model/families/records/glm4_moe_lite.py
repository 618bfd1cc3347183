from __future__ import annotations

from moe_conformance.model.families.configs import KNOBS, MODEL, N_ROUTED, N_SHARED, NOAUX, NOAUX_TC, OWN_WIDTH, TYPES
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="glm4_moe_lite",
    config_class="Glm4MoeLiteConfig",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1))),
    method=Method(noaux(1.8), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    beside=NOAUX_TC,
    ways=NOAUX,
    block=Block(KNOBS),
    # GLM-4.7-Flash's config.json counts them.
    configs=(Config("hub", keys={"first_k_dense_replace": 1}, dropped=("mlp_layer_types",), form="plain"),),
    tiny=Tiny("Glm4MoeLiteForCausalLM"),
)
