from __future__ import annotations

from moe_conformance.model.families.configs import GELU, KIMI, MODEL, NUM_SHARED, OWN_WIDTH, PER_TOKEN, SCALED, TYPES
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, BLOCK_SPARSE, PACKED, ROUTER, SHARED_EXPERTS, Names, one, shared
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, groups, noaux, norm

RECORD = Record(
    model_type="kimi_linear",
    config_class="KimiLinearConfig",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1, "first_k_dense_replace"))),
    method=Method(
        {
            **noaux(2.446),
            **norm(True, "moe_renormalize", "norm_topk_prob"),
            **groups(1, 1, "num_expert_group", "n_group"),
        },
        FLOAT32,
    ),
    names=Names(
        BLOCK_SPARSE
        + one("block_sparse_moe.gate.e_score_correction_bias", "router.selection_bias")
        + shared("block_sparse_moe.shared_experts"),
        PACKED + ROUTER + BIAS + SHARED_EXPERTS,
    ),
    config=MODEL | PER_TOKEN | OWN_WIDTH | TYPES | NUM_SHARED,
    beside={"moe_router_activation_func": "sigmoid", "use_grouped_topk": True},
    ways=(KIMI | {"moe_renormalize": True} | GELU, KIMI | {"moe_renormalize": False}),
    block=Block(SCALED | {"num_expert_group": 4, "topk_group": 2, "moe_renormalize": True}),
    variants={"no-norm": Variant({"moe_renormalize": False})},
    configs=(Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),),
    captured=("hub",),
    tiny=Tiny("KimiLinearForCausalLM"),
)
