from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH, WIDE_SHARED
from moe_conformance.model.families.naming import GRANITE
from moe_conformance.model.families.record import DENSE_WIDTH, Config, Method, Record, Shared, Sizes, Tiny
from moe_conformance.model.families.words import CHOSEN

RECORD = Record(
    model_type="granitemoeshared",
    config_class="GraniteMoeSharedConfig",
    sizes=Sizes(width=DENSE_WIDTH, shared=Shared(1, ("shared_intermediate_size",))),
    method=Method(CHOSEN),
    names=GRANITE,
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED,
    ways=ONLY_ACT,
    configs=(Config("no-shared", keys={"shared_intermediate_size": 0}),),
    tiny=Tiny("GraniteMoeSharedForCausalLM"),
    sample="core",
)
