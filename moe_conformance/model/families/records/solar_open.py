from __future__ import annotations

from moe_conformance.model.families.configs import KNOBS, MODEL, MOE_WIDTH, N_ROUTED, N_SHARED, NOAUX
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="solar_open",
    config_class="SolarOpenConfig",
    sizes=Sizes(shared=COUNTED),
    method=Method(noaux(1.0), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | MOE_WIDTH | N_SHARED,
    ways=NOAUX,
    block=Block(KNOBS),
    tiny=Tiny("SolarOpenForCausalLM"),
)
