from __future__ import annotations

from moe_conformance.model.families.configs import (
    FIRST_K,
    KNOBS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NOAUX,
    ONE_GROUP,
    OWN_WIDTH,
)
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

# The experts counted by the names of the first code.
_AS_PUBLISHED = {"num_experts": 11, "num_shared_experts": 2}
_NOT_NAMED = ("n_routed_experts", "n_shared_experts")

RECORD = Record(
    model_type="sarvam_moe",
    config_class="SarvamMoEConfig",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(1, "first_k_dense_replace")),
    method=Method(noaux(2.5), FLOAT32),
    names=Names(EACH + ROUTER + one("mlp.gate.expert_bias", "router.selection_bias") + SHARED_EXPERTS, PACKED + BIAS),
    config=MODEL | N_ROUTED | OWN_WIDTH | ONE_GROUP | FIRST_K | N_SHARED,
    beside={"moe_router_enable_expert_bias": True},
    ways=NOAUX,
    block=Block(KNOBS),
    configs=(
        Config("hub", keys=_AS_PUBLISHED, dropped=_NOT_NAMED, form="plain"),
        Config("hub", kind="layers", keys=_AS_PUBLISHED, dropped=_NOT_NAMED, form="plain"),
    ),
    tiny=Tiny("Glm4MoeForCausalLM", config_class="SarvamMoEConfig"),
)
