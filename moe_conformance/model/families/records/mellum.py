from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NO_NORM, NORM, NORM_OR_NOT, NUM_EXPERTS, OWN_WIDTH, TYPES
from moe_conformance.model.families.layers import every_layer, typed
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="mellum",
    config_class="MellumConfig",
    sizes=Sizes(layers=typed(every_layer)),
    method=Method(norm(True)),
    names=Names(EACH + ROUTER, PACKED),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | TYPES,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("MellumForCausalLM"),
)
