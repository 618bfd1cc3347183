from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NO_NORM, NORM, NORM_OR_NOT, NUM_EXPERTS, PLAIN_WIDTH
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import DENSE_WIDTH, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="olmoe",
    config_class="OlmoeConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(norm(False)),
    names=Names(EACH + ROUTER, PACKED),
    config=MODEL | NUM_EXPERTS | PLAIN_WIDTH,
    ways=NORM_OR_NOT,
    # A width that kernels which take multiples of 32 alone must pad.
    block=Block(NO_NORM | {"intermediate_size": 72}),
    variants={"norm": Variant(NORM, lenient="no published config of OLMoE normalises")},
    tiny=Tiny("OlmoeForCausalLM"),
)
