from __future__ import annotations

from moe_conformance.model.families.configs import (
    MODEL,
    NO_NORM,
    NORM,
    NORM_OR_NOT,
    NUM_EXPERTS,
    ONE_SHARED,
    OWN_WIDTH,
    SECOND_OF_TWO,
)
from moe_conformance.model.families.layers import sparse_step
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, Names, shared
from moe_conformance.model.families.record import (
    ONE_OF_ITS_OWN_WIDTH,
    Block,
    Config,
    Method,
    Record,
    Sizes,
    Tiny,
    Variant,
)
from moe_conformance.model.families.words import FLOAT32, norm

RECORD = Record(
    model_type="flint",
    config_class="FlintConfig",
    sizes=Sizes(layers=sparse_step(skip=(0, 1)), least_experts=1, shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method({"score": "sigmoid", **norm(True)}, FLOAT32),
    names=Names(EACH + ROUTER + shared("mlp.shared_expert"), PACKED),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(Config("no-experts", kind="dense", keys={"num_experts": 0}),),
    tiny=Tiny("FlintForCausalLM", keys={"mlp_only_layers": [0]}),
)
