from __future__ import annotations

from moe_conformance.model.families.configs import (
    KNOBS,
    MODEL,
    NO_NORM,
    NOAUX,
    NUM_EXPERTS,
    ONE_GROUP,
    OWN_WIDTH,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, activation, noaux, output_scale

RECORD = Record(
    model_type="beam",
    config_class="BeamConfig",
    sizes=Sizes(layers=typed(leading_dense(3))),
    method=Method(noaux(None, 8, 4), FLOAT32, {**activation(), "dtype": "float32"}, layer=output_scale(2.5)),
    names=Names(EACH + ROUTER + BIAS, PACKED),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | ONE_GROUP | TYPES,
    ways=(NOAUX[0] | {"num_experts": 12}, NOAUX[1] | {"num_experts": 12}),
    block=Block(KNOBS),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("BeamForCausalLM", keys={"mlp_layer_types": ["dense", "sparse", "sparse"]}),
)
