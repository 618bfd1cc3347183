from __future__ import annotations

from moe_conformance.model.families.configs import KNOBS, MODEL, N_ROUTED, N_SHARED, NOAUX, NOAUX_TC, OWN_WIDTH, TYPES
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="glm_moe_dsa",
    config_class="GlmMoeDsaConfig",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(3, "first_k_dense_replace"))),
    method=Method(noaux(2.5), FLOAT32),
    dead=("mlp_bias",),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    beside=NOAUX_TC,
    ways=NOAUX,
    block=Block(KNOBS),
    configs=(Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),),
    tiny=Tiny("GlmMoeDsaForCausalLM"),
)
