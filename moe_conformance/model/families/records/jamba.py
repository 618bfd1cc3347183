from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_EXPERTS, ONLY_ACT, PLAIN_WIDTH
from moe_conformance.model.families.layers import period
from moe_conformance.model.families.naming import Names, each, one, packed
from moe_conformance.model.families.record import DENSE_WIDTH, Block, Config, Method, Record, Sizes, Tiny

RECORD = Record(
    model_type="jamba",
    config_class="JambaConfig",
    sizes=Sizes(width=DENSE_WIDTH, layers=period, least_experts=2),
    method=Method(),
    names=Names(
        each("feed_forward.experts") + one("feed_forward.router.weight", "router.proj"), packed("feed_forward.experts")
    ),
    config=MODEL | NUM_EXPERTS | PLAIN_WIDTH | {"expert_layer_period": 4, "expert_layer_offset": 2},
    ways=ONLY_ACT,
    block=Block({"expert_layer_period": 2, "expert_layer_offset": 1}),
    configs=(Config("one-expert", kind="dense", keys={"num_experts": 1, "num_experts_per_tok": 1}),),
    tiny=Tiny("JambaForCausalLM", keys={"expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1}),
)
