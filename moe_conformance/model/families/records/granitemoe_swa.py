from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH, WIDE_SHARED
from moe_conformance.model.families.naming import GRANITE_MLP, GRANITE_MODULES, Names
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Shared, Sizes, Tiny
from moe_conformance.model.families.words import CHOSEN

RECORD = Record(
    model_type="granitemoe_swa",
    config_class="GraniteMoeSWAConfig",
    sizes=Sizes(width=DENSE_WIDTH, shared=Shared(1, ("shared_intermediate_size",))),
    method=Method(CHOSEN),
    names=Names(GRANITE_MODULES + GRANITE_MLP),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED,
    ways=ONLY_ACT,
    tiny=Tiny("GraniteMoeSWAForCausalLM"),
)
