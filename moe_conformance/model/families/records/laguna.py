from __future__ import annotations

from moe_conformance.model.families.configs import GELU, MODEL, NUM_EXPERTS, ONE_SHARED, OWN_WIDTH, SCALE, TYPES
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one, shared
from moe_conformance.model.families.record import ONE_OF_ITS_OWN_WIDTH, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import SIGMOID, output_scale

RECORD = Record(
    model_type="laguna",
    config_class="LagunaConfig",
    sizes=Sizes(layers=typed(leading_dense(1)), shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(
        {**SIGMOID, "logit_softcap": Key("moe_router_logit_softcapping", 0.0)},
        layer=output_scale(1.0, "moe_routed_scaling_factor"),
    ),
    dead=("moe_apply_router_weight_on_input",),
    names=Names(
        EACH
        + ROUTER
        + one("mlp.experts.e_score_correction_bias", "router.selection_bias")
        + shared("mlp.shared_expert"),
        PACKED + BIAS + SHARED_EXPERTS,
    ),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | TYPES | ONE_SHARED,
    ways=({"moe_routed_scaling_factor": 3.5, "moe_router_logit_softcapping": 2.5} | GELU,),
    block=Block({"moe_routed_scaling_factor": SCALE, "moe_router_logit_softcapping": 1.25}),
    variants={"no-softcap": Variant({"moe_router_logit_softcapping": 0.0})},
    tiny=Tiny("LagunaForCausalLM"),
)
