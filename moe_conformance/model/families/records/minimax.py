from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH
from moe_conformance.model.families.naming import BLOCK_SPARSE, PACKED, ROUTER, Names
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import ALWAYS

RECORD = Record(
    model_type="minimax",
    config_class="MiniMaxConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(ALWAYS),
    dead=("router_jitter_noise",),
    names=Names(BLOCK_SPARSE, PACKED + ROUTER),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=ONLY_ACT,
    tiny=Tiny("MiniMaxForCausalLM"),
)
