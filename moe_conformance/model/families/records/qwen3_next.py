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
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_GATED, Names
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
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="qwen3_next",
    config_class="Qwen3NextConfig",
    sizes=Sizes(layers=sparse_step(), least_experts=1, shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(norm(True), shared={"gate": True}),
    names=Names(EACH + ROUTER + SHARED_GATED, PACKED),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(
        Config("no-experts", kind="dense", keys={"num_experts": 0}),
        Config("hub", kind="layers", form="plain"),
    ),
    tiny=Tiny("Qwen3NextForCausalLM"),
)
