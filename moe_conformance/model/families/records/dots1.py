from __future__ import annotations

from moe_conformance.model.families.configs import (
    FIRST_K,
    KNOBS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NO_NORM,
    NOAUX,
    NOAUX_TC,
    OWN_WIDTH,
)
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="dots1",
    config_class="Dots1Config",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(0, "first_k_dense_replace")),
    method=Method(noaux(1.0, normed=False), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED,
    beside=NOAUX_TC,
    ways=NOAUX,
    block=Block(KNOBS),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(
        Config("without-experts", kind="refused", keys={"n_routed_experts": None}, names=("n_routed_experts",)),
        Config("without-shared", kind="refused", keys={"n_shared_experts": None}, names=("n_shared_experts",)),
    ),
    tiny=Tiny("Dots1ForCausalLM"),
)
