from __future__ import annotations

from moe_conformance.model.families.configs import (
    GELU,
    KIMI,
    MODEL,
    NUM_SHARED,
    OWN_WIDTH,
    PER_TOKEN,
    SCALED,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, groups, noaux, norm

RECORD = Record(
    model_type="bailing_hybrid",
    config_class="BailingHybridConfig",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(2, "first_k_dense_replace"))),
    method=Method(
        {
            **noaux(2.5),
            **norm(True, "moe_renormalize", "norm_topk_prob"),
            **groups(8, 4, "num_expert_group", "n_group"),
        },
        FLOAT32,
    ),
    names=Names(EACH + ROUTER + one("mlp.gate.expert_bias", BIAS[0].target) + SHARED_EXPERTS, PACKED + BIAS),
    config=MODEL | PER_TOKEN | OWN_WIDTH | {"num_expert_group": 1, "topk_group": 1} | TYPES | NUM_SHARED,
    beside={"score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ways=(KIMI | {"moe_renormalize": True} | GELU, KIMI | {"moe_renormalize": False}),
    block=Block({"num_expert_group": 4, "topk_group": 2} | SCALED | {"moe_renormalize": True}),
    variants={"no-norm": Variant({"moe_renormalize": False})},
    configs=(Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),),
    tiny=Tiny("BailingHybridForCausalLM"),
    authority=(
        "transformers, whose class has no expert_swiglu_limit_list; engines read it, and a config that sets "
        "it is not judged"
    ),
)
