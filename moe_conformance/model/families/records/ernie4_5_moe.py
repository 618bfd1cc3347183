from __future__ import annotations

from moe_conformance.model.families.configs import GELU, MODEL, MOE_K, MOE_SHARED, NO_SUCH, OWN_WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import window
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import ALWAYS, BIASED, FLOAT32, bias

RECORD = Record(
    model_type="ernie4_5_moe",
    config_class="Ernie4_5_MoeConfig",
    sizes=Sizes(shared=COUNTED, layers=window),
    method=Method({**BIASED, **ALWAYS, "floor": Key("moe_norm_min", 1e-12)}, FLOAT32, shared_mlp=bias("use_bias")),
    names=Names(
        EACH + ROUTER + one("mlp.moe_statics.e_score_correction_bias", "router.selection_bias", "row") + SHARED_EXPERTS,
        PACKED + one("mlp.gate.moe_statics.e_score_correction_bias", "router.selection_bias", "row"),
    ),
    config=MODEL
    | MOE_K
    | OWN_WIDTH
    | MOE_SHARED
    | {"moe_layer_start_index": 2, "moe_layer_end_index": 6, "moe_layer_interval": 2},
    ways=({"moe_norm_min": 0.125, "use_bias": True} | GELU,),
    block=Block(
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1, "moe_norm_min": 0.9375}
    ),
    variants={"no-shared": Variant({"moe_num_shared_experts": 0})},
    configs=(
        Config("to-last", keys={"moe_layer_end_index": -1}),
        Config("window-ends", keys={"moe_layer_start_index": 3, "moe_layer_end_index": 5}),
        Config("no-shared", keys={"moe_num_shared_experts": 0}),
        Config(
            "two-top-ks",
            kind="refused",
            keys={"num_experts_per_tok": 5},
            form="plain",
            names=("moe_k", "num_experts_per_tok"),
            lenient=NO_SUCH,
        ),
    ),
    captured=("",),
    tiny=Tiny("Ernie4_5_MoeForCausalLM"),
)
