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
    ONE_GROUP,
    OWN_WIDTH,
)
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="deepseek_v3",
    # Kimi K2 on the hub, by remote code of its own, and the model around it, whose class in transformers reads its text
    # config as this family's.
    also=("kimi_k2", "kimi_k25"),
    config_class="DeepseekV3Config",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(3, "first_k_dense_replace")),
    method=Method(noaux(2.5, 8, 4), FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED, prefixes={"kimi_k25": "language_model.model."}),
    config=MODEL | N_ROUTED | OWN_WIDTH | ONE_GROUP | FIRST_K | N_SHARED,
    beside=NOAUX_TC,
    ways=NOAUX,
    block=Block(KNOBS),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(
        Config("hub", kind="layers", keys={"n_routed_experts": 16}, dropped=("n_group", "topk_group"), form="plain"),
        Config("every-layer-dense", kind="dense", keys={"first_k_dense_replace": 9}),
        Config("kimi-k25-hub", keys={"model_type": "kimi_k2"}, form="plain", model_type="kimi_k25"),
    ),
    captured=("",),
    tiny=Tiny("DeepseekV3ForCausalLM", keys={"head_dim": 4}),
    sample="smoke",
)
