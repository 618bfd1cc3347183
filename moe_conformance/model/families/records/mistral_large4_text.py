from __future__ import annotations

from moe_conformance.model.families.configs import (
    GELU,
    GROUPED,
    GROUPS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    OWN_WIDTH,
    RESCALED,
    SCALED,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import (
    PACKED,
    ROUTER,
    SHARED_EXPERTS,
    W1_W3_W2,
    Names,
    each,
    mlp,
    one,
    shared,
)
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import ALWAYS, FLOAT32, SOFTMAX_PAIRS

RECORD = Record(
    model_type="mistral_large4_text",
    config_class="MistralLarge4TextConfig",
    wrapper=Wrapper("MistralLarge4Config"),
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1, "first_k_dense_replace"))),
    method=Method({**SOFTMAX_PAIRS, **ALWAYS}, FLOAT32),
    names=Names(
        each("experts", *W1_W3_W2) + one("gate.weight", "router.proj") + mlp("shared_experts", "shared", *W1_W3_W2),
        PACKED + ROUTER + SHARED_EXPERTS + shared("shared_experts"),
        prefixes={"mistral_large4": ""},
    ),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    ways=(GROUPED | RESCALED | GELU,),
    block=Block(GROUPS | SCALED),
    configs=(Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),),
    tiny=Tiny("MistralLarge4ForConditionalGeneration"),
)
