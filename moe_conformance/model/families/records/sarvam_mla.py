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
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, noaux

# The experts counted by the names of the first code, and neither groups nor the score named.
_AS_PUBLISHED = {"num_experts": 16, "num_shared_experts": 2, "head_dim": 576, "q_head_dim": 192}
_NOT_NAMED = ("n_routed_experts", "n_shared_experts", "n_group", "topk_group")

RECORD = Record(
    model_type="sarvam_mla",
    config_class="SarvamMLAConfig",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(1, "first_k_dense_replace")),
    method=Method(noaux(2.5), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | ONE_GROUP | FIRST_K | N_SHARED,
    beside={"moe_router_enable_expert_bias": True},
    ways=NOAUX,
    block=Block(KNOBS),
    # Without the keys there are no groups: the class says 1, where DeepSeek-V3's says 8.
    variants={"flat": Variant(dropped=("n_group", "topk_group"))},
    configs=(
        Config("hub", keys=_AS_PUBLISHED, dropped=_NOT_NAMED, form="plain"),
        Config("hub", kind="layers", keys=_AS_PUBLISHED, dropped=_NOT_NAMED, form="plain"),
    ),
    tiny=Tiny("DeepseekV3ForCausalLM", config_class="SarvamMLAConfig", keys={"head_dim": 4}),
    authority=(
        "transformers, whose class says one group: vLLM's author of the model says the same (vllm#56034, flat "
        "top-8 of 128); by a public study the first remote code takes experts // 8 groups where the config "
        "names none"
    ),
)
