from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, MOE_WIDTH, NO_NORM, NORM, NORM_OR_NOT, NUM_EXPERTS, ONE_SHARED
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import ONE_OF_ITS_OWN_WIDTH, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import BIASED, CHOSEN, FLOAT32, norm

RECORD = Record(
    model_type="kolibri1",
    config_class="Kolibri1Config",
    sizes=Sizes(shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method({**CHOSEN, "score": "sigmoid", **BIASED, **norm(False)}, FLOAT32),
    names=Names(EACH + ROUTER + one("moe.router.expert_bias", "router.selection_bias") + SHARED_EXPERTS, PACKED + BIAS),
    config=MODEL | NUM_EXPERTS | MOE_WIDTH | ONE_SHARED,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("Kolibri1ForCausalLM"),
)
