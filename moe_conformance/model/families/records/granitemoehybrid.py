from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH, WIDE_SHARED
from moe_conformance.model.families.naming import GRANITE
from moe_conformance.model.families.record import DENSE_WIDTH, Block, Config, Method, Record, Shared, Sizes, Tiny
from moe_conformance.model.families.words import CHOSEN

RECORD = Record(
    model_type="granitemoehybrid",
    config_class="GraniteMoeHybridConfig",
    sizes=Sizes(width=DENSE_WIDTH, shared=Shared(1, ("shared_intermediate_size",)), least_experts=1),
    method=Method(CHOSEN),
    names=GRANITE,
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | WIDE_SHARED | {"mamba_n_heads": 10},
    ways=ONLY_ACT,
    block=Block({"mamba_n_heads": 12, "layer_types": ["mamba", "attention"]}),
    configs=(Config("dense", kind="dense", keys={"num_local_experts": 0, "num_experts_per_tok": 0}),),
    tiny=Tiny("GraniteMoeHybridForCausalLM", keys={"mamba_n_heads": 8, "layer_types": ["mamba", "attention", "mamba"]}),
)
