from __future__ import annotations

from moe_conformance.model.families.configs import GELU, MODEL, NUM_LOCAL, PLAIN_WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.naming import BLOCK_SPARSE, PACKED, Names, one
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import CHOSEN, INPUT

RECORD = Record(
    model_type="phimoe",
    config_class="PhimoeConfig",
    # Its router, SparseMixer, takes two whatever the key says.
    sizes=Sizes(width=DENSE_WIDTH, top_k=2),
    method=Method({**CHOSEN, **INPUT, "selector": "sparsemixer", "jitter": Key("router_jitter_noise", 0.01)}),
    dead=("num_experts_per_tok", "input_jitter_noise"),
    names=Names(BLOCK_SPARSE, PACKED + one("mlp.router.weight", "router.proj")),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | {"num_experts_per_tok": 2},
    ways=({"router_jitter_noise": 0.125} | GELU,),
    variants={"jitter": Variant({"router_jitter_noise": 0.25}, lenient="every published config has 0.01")},
    tiny=Tiny("PhimoeForCausalLM"),
)
