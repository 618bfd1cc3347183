from __future__ import annotations

from moe_conformance.model.families.configs import (
    GROUPS,
    MODEL,
    N_ROUTED,
    NO_NORM,
    NOAUX,
    NOAUX_TC,
    NORM,
    OWN_WIDTH,
    SCALED,
    TYPES,
)
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="mimo_v2_flash",
    config_class="MiMoV2FlashConfig",
    sizes=Sizes(layers=typed(leading_dense(1))),
    # The published config.json has null, which the config class reads as 1.
    method=Method(
        {**noaux(None), "scale": Key("routed_scaling_factor", 1.0, lambda scale: 1.0 if scale is None else scale)},
        FLOAT32,
    ),
    names=Names(EACH + ROUTER + BIAS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES,
    beside=NOAUX_TC,
    ways=NOAUX,
    block=Block(GROUPS | NORM),
    variants={
        "no-norm": Variant(NO_NORM),
        "scaled": Variant(SCALED, lenient="published configs have null for the scaling factor"),
    },
    tiny=Tiny("MiMoV2FlashForCausalLM", keys={"head_dim": 24, "layer_types": ["full_attention"] * 3}),
)
