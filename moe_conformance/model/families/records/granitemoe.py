from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH
from moe_conformance.model.families.naming import GRANITE_MODULES, Names, one, packed
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import CHOSEN

RECORD = Record(
    model_type="granitemoe",
    config_class="GraniteMoeConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(CHOSEN),
    names=Names(
        packed("block_sparse_moe", first="input_linear.weight", second="output_linear.weight")
        + one("block_sparse_moe.router.layer.weight", "router.proj"),
        GRANITE_MODULES,
    ),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=ONLY_ACT,
    tiny=Tiny("GraniteMoeForCausalLM"),
)
