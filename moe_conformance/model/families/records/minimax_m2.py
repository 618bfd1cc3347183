from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH
from moe_conformance.model.families.naming import BLOCK_SPARSE, PACKED, ROUTER, Names, one
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import SIGMOID

RECORD = Record(
    model_type="minimax_m2",
    config_class="MiniMaxM2Config",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(SIGMOID),
    dead=("router_jitter_noise",),
    names=Names(
        BLOCK_SPARSE + one("block_sparse_moe.e_score_correction_bias", "router.selection_bias"),
        PACKED + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias"),
    ),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    beside={"scoring_func": "sigmoid", "use_routing_bias": True},
    ways=ONLY_ACT,
    tiny=Tiny("MiniMaxM2ForCausalLM"),
)
