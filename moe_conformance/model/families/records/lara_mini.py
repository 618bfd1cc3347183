from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, MOE_WIDTH, NO_NORM, NORM, NORM_OR_NOT, NUM_EXPERTS, ONE_SHARED
from moe_conformance.model.families.naming import PACKED, ROUTER, Names, shared
from moe_conformance.model.families.record import ONE_OF_ITS_OWN_WIDTH, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, norm

RECORD = Record(
    model_type="lara_mini",
    config_class="LaraMiniConfig",
    sizes=Sizes(shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(norm(True), FLOAT32),
    names=Names(PACKED + ROUTER + shared("mlp.shared_expert")),
    config=MODEL | NUM_EXPERTS | MOE_WIDTH | ONE_SHARED,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("LaraMiniForCausalLM"),
)
