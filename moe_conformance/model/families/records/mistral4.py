from __future__ import annotations

from moe_conformance.model.families.configs import FIRST_K, KNOBS, MODEL, N_ROUTED, N_SHARED, NO_NORM, NOAUX, OWN_WIDTH
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import INPUT, SOFTMAX_PAIRS, norm

RECORD = Record(
    model_type="mistral4",
    config_class="Mistral4Config",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(0, "first_k_dense_replace")),
    method=Method({**SOFTMAX_PAIRS, **norm(True), **INPUT}),
    names=Names(PACKED + ROUTER + SHARED_EXPERTS),
    config=MODEL | N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED,
    ways=NOAUX,
    block=Block(KNOBS),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("Mistral4ForCausalLM"),
)
